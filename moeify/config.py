"""What the user decides about a conversion: one frozen dataclass, checked when it is made."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from moeify.errors import ConfigError

METHODS = ("copy",)


@dataclass(frozen=True)
class MoEConfig:
    """How a dense FFN becomes experts and a router.

    Attributes:
        experts: Experts in each converted layer.
        top_k: Experts that each token visits.
        method: How experts are made from the FFN. "copy": each is a copy (sparse upcycling, Komatsuzaki et al. 2022).
        renormalize: The weights of the chosen experts sum to 1; with "copy" this makes the conversion exact.
        aux_loss: Coefficient of the load-balancing loss, written into native checkpoints for the training code that
            reads it there.
        seed: Start of every random number; each tensor's numbers depend on this and the tensor's name only.

    Raises:
        ConfigError: a value out of range; the message names the field.
    """

    experts: int
    top_k: int
    method: str = "copy"
    renormalize: bool = True
    aux_loss: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if self.experts < 1:
            raise ConfigError(f"experts is {self.experts}: at least 1 is needed")
        if self.top_k < 1:
            raise ConfigError(f"top_k is {self.top_k}: each token must visit at least 1 expert")
        if self.top_k > self.experts:
            raise ConfigError(f"top_k is {self.top_k} but there are only {self.experts} experts: lower top_k")
        if self.method not in METHODS:
            raise ConfigError(f"method is {self.method!r}: expected one of {', '.join(METHODS)}")
        if self.aux_loss < 0:
            raise ConfigError(f"aux_loss is {self.aux_loss}: a coefficient cannot be negative")

    @property
    def exact(self) -> bool:
        """Whether the converted model must compute what the dense one did."""
        return self.method == "copy" and self.renormalize

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return asdict(self)
