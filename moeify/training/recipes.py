"""What is known about fine-tuning sparse models, as settings instead of folklore.

The papers give directions and, where they give numbers, these are theirs; factors that are ours are marked so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from moeify.training.control import Part, freeze
from moeify.training.layers_of import layers_of


@dataclass(frozen=True)
class FineTuning:
    """How to fine-tune a sparse model, relative to what works for the dense one.

    Attributes:
        learning_rate: Factor on the dense model's learning rate.
        batch_size: Factor on the dense model's batch size.
        dropout: Dropout outside the experts.
        expert_dropout: Dropout inside the experts; None leaves it.
        frozen: Part that is not trained, or None.
    """

    learning_rate: float = 1.0
    batch_size: float = 1.0
    dropout: float = 0.1
    expert_dropout: float | None = None
    frozen: Part | None = None

    @classmethod
    def switch(cls) -> FineTuning:
        """Regularise the experts, which see fewer tokens each: dropout 0.4 inside them, 0.1 elsewhere.

        Switch Transformer (Fedus et al. 2021), Table 4: better than 0.1 everywhere on GLUE (85.2 against 84.7) and
        CNN/DailyMail (19.6 against 19.1).
        """
        return cls(dropout=0.1, expert_dropout=0.4)

    @classmethod
    def st_moe(cls) -> FineTuning:
        """Smaller batches and a higher learning rate than the dense model likes.

        ST-MoE (Zoph et al. 2022): sparse models gain from both where dense ones lose. The paper sweeps
        values for its own models; the factors here, a quarter of the batch and twice the rate, are ours.
        """
        return cls(learning_rate=2.0, batch_size=0.25)

    @classmethod
    def frozen_experts(cls) -> FineTuning:
        """Train everything but the MoE layers: less memory, about the same quality.

        ST-MoE: freezing the MoE layers nearly matched training everything; training only them was worse.
        """
        return cls(frozen="moe")

    def prepare(self, model: nn.Module) -> None:
        """Set the experts' dropout and freeze; rates, batches and the other dropout belong to the script."""
        if self.expert_dropout is not None:
            for layer in layers_of(model).values():
                for stack in (layer.experts, layer.shared_expert):
                    experts: Any = stack
                    if experts is not None:
                        experts.dropout = self.expert_dropout
        if self.frozen is not None:
            freeze(model, self.frozen)


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Attributes:
        tasks: "many", mixed in each batch with an instruction that says which, or "one".
        how: Settings of the stage.
    """

    tasks: str
    how: FineTuning


# FLAN-MoE (Shen et al. 2023, arXiv:2305.14705): fine-tuned on one task at once, sparse models fall behind dense ones of
# the same cost; after instruction tuning on many tasks they are ahead.
INSTRUCTION_FIRST = (Stage("many", FineTuning.st_moe()), Stage("one", FineTuning.switch()))
