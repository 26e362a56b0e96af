"""The experts as one `nn.Linear` for each projection of each expert, for tools that see nothing else.

Shape legend: T tokens, H hidden size, I intermediate size, J rows of the up projections (2I with a gate), E experts,
K choices per token, S = T·K choices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from moeify.errors import RefusedError
from moeify.layers.experts import Experts

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"


class LinearExpert(nn.Module):
    """One expert: each projection is a module of its own, which a tool may replace.

    Args:
        linears: The projections by their names, the down projection last.
    """

    def __init__(self, linears: Mapping[str, nn.Linear]) -> None:
        super().__init__()
        *self.ups, self.down = linears
        for name, linear in linears.items():
            self.add_module(name, linear)

    def forward(self, x_SH: Tensor, between: Callable[[list[Tensor]], Tensor]) -> Tensor:
        """Return the expert's output (S, H); `between` takes what the up projections return."""
        a_SI = between([getattr(self, name)(x_SH) for name in self.ups])
        out_SH: Tensor = getattr(self, self.down)(a_SI)
        return out_SH


class LinearExperts(nn.Module):
    """The same experts in another form, in the place of the stacked ones.

    State: `0.gate_proj.weight`, `0.up_proj.weight`, `0.down_proj.weight`, and so on; what else the stacked experts had
    (an activation with weights, a norm) keeps its name.

    Args:
        stacked: A module of transformers' experts interface; its parameters become those of the linears, as views of
            its tensors where these lie as a linear has them, and it is left without any.
        names: What the gate, up and down projections are called.

    Attributes:
        stacked: The module that had the weights; it says what stands between the projections.
        shapes: The shapes of its parameters.
    """

    def __init__(self, stacked: Any, names: Mapping[str, str]) -> None:
        super().__init__()
        self.stacked: Any
        self.__dict__["stacked"] = stacked  # not a submodule: what it holds is held here
        self.num_experts, self.names = stacked.num_experts, dict(names)
        for name, child in stacked.named_children():
            self.add_module(name, child)
        parameters = dict(stacked.named_parameters(recurse=False))
        self.shapes = {name: parameter.shape for name, parameter in parameters.items()}
        for number, expert in enumerate(_linears(stacked, parameters)):
            self.add_module(str(number), LinearExpert({names[key]: linear for key, linear in expert.items()}))
        for name in parameters:
            stacked._parameters[name] = None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return Σ_k weight · expert(x), by a loop over the experts.

        Args:
            hidden_states: (T, H).
            top_k_index: (T, K) integers; an id outside [0, E) contributes zero.
            top_k_weights: (T, K).
        """
        ours = isinstance(self.stacked, Experts)  # the sums of both loops, in their order and dtype
        dtype = torch.promote_types(hidden_states.dtype, top_k_weights.dtype) if ours else hidden_states.dtype
        out_TH = torch.zeros_like(hidden_states, dtype=dtype)
        norm = self.stacked.post_expert_norm if getattr(self.stacked, "has_post_expert_norm", False) else None
        for number in range(self.num_experts):
            chosen_TK = top_k_index == number
            token, choice = chosen_TK.nonzero(as_tuple=True) if ours else chosen_TK.t().nonzero(as_tuple=True)[::-1]
            if not len(token) and not torch.is_grad_enabled():  # in training every weight has a gradient
                continue
            y = self.get_submodule(str(number))(hidden_states[token], self._between)
            y = y if norm is None else norm(y)
            out_TH = out_TH.index_add(0, token, (y * top_k_weights[token, choice, None]).to(dtype))
        return out_TH.to(hidden_states.dtype)

    def _between(self, ups: list[Tensor]) -> Tensor:
        """Compute what stands between the projections, which knows gate and up rows as the stacked weights had them."""
        if not self.stacked.has_gate:
            a_SI: Tensor = self.stacked.act_fn(ups[0])
            return a_SI
        z_SJ = torch.cat(ups, -1) if self.stacked.is_concatenated else torch.stack(ups, -1).flatten(-2)
        gated_SI: Tensor = self.stacked._apply_gate(z_SJ)
        return gated_SI

    def train(self, mode: bool = True) -> LinearExperts:
        """Set the mode, also of the module that computes what stands between the projections."""
        self.stacked.train(mode)
        super().train(mode)
        return self

    def check(self, path: str) -> None:
        """Refuse to be stacked if a tool has replaced something; `path` is where the experts are, for the message.

        Raises:
            RefusedError: A projection is no `nn.Linear` any more.
        """
        for number in range(self.num_experts):
            for name, linear in self.get_submodule(str(number)).named_children():
                if type(linear) is not nn.Linear:
                    raise RefusedError(
                        f"{path}.{number}.{name} is a {type(linear).__name__} and no nn.Linear any more, and cannot be "
                        "stacked: undo what replaced it (merge adapters, dequantize)"
                    )

    @torch.no_grad()
    def restack(self) -> nn.Module:
        """Return the stacked form, with the weights of the linears, which are let go one stacked tensor at a time."""
        for name, shape in self.shapes.items():
            kind = "bias" if name.endswith("_bias") else "weight"
            first = self._held(DOWN if name.startswith(DOWN) else UP, 0)._parameters[kind]
            assert first is not None
            tensor = torch.empty(shape, dtype=first.dtype, device=first.device)
            for key, views in projections(self.stacked, {name: tensor}).items():
                for number, part in enumerate(cast("Tensor", views[kind == "bias"])):
                    held = self._held(key, number)._parameters
                    part.copy_(held[kind])
                    held[kind] = None
            self.stacked._parameters[name] = nn.Parameter(tensor, first.requires_grad)
        stacked: nn.Module = self.stacked
        return stacked

    def _held(self, projection: str, number: int) -> nn.Module:
        return self.get_submodule(f"{number}.{self.names[projection]}")

    def extra_repr(self) -> str:
        """Describe the experts in `repr`."""
        return f"{self.num_experts} x linear"


def projections(stacked: Any, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """Return the weights (E, out, in) and biases (E, out) of each projection, as views of stacked tensors.

    Args:
        stacked: The module, which says how the tensors lie.
        tensors: Some of its tensors, by their names.
    """
    up_name = "gate_up_proj" if stacked.has_gate else UP
    found: dict[str, tuple[Tensor | None, Tensor | None]] = {}
    for name in (up_name, DOWN):
        weight, bias = tensors.get(name), tensors.get(f"{name}_bias")
        if weight is not None and stacked.is_transposed:
            weight = weight.transpose(1, 2)
        if weight is None and bias is None:
            continue
        if name == "gate_up_proj":
            halves = [_gate_and_up(tensor, stacked.is_concatenated) for tensor in (weight, bias)]
            found |= dict(zip((GATE, UP), zip(*halves, strict=True), strict=True))
        else:
            found[name] = (weight, bias)
    return found


def _gate_and_up(tensor: Tensor | None, concatenated: bool) -> tuple[Tensor | None, Tensor | None]:
    if tensor is None:
        return None, None
    if not concatenated:
        return tensor[:, ::2], tensor[:, 1::2]
    gate, up = tensor.chunk(2, dim=1)
    return gate, up


def _linears(stacked: Any, parameters: Mapping[str, nn.Parameter]) -> Iterator[dict[str, nn.Linear]]:
    """Make the projections of each expert, with weights that are trained if the stacked ones are."""
    views, up_name = projections(stacked, parameters), next(name for name in parameters if not name.startswith(DOWN))
    for number in range(stacked.num_experts):
        expert = {}
        for key, held in views.items():
            rows, columns = cast("Tensor", held[0])[number].shape
            expert[key] = nn.Linear(columns, rows, held[1] is not None, device="meta")
            for kind, suffix, tensor in zip(("weight", "bias"), ("", "_bias"), held, strict=True):
                if tensor is not None:
                    trained = parameters[(DOWN if key == DOWN else up_name) + suffix].requires_grad
                    setattr(expert[key], kind, nn.Parameter(tensor[number].detach().contiguous(), trained))
        yield expert
