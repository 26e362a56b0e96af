"""Advice of the papers on fine-tuning MoE models, as settings.

Numbers are those of the papers, where these give numbers; factors of our own are marked.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from moeify.contract.found import FoundLayer
from moeify.errors import RefusedError
from moeify.layers import Experts
from moeify.training.control import ModelPart, freeze
from moeify.training.layers_of import layers_of


@dataclass(frozen=True)
class FineTuning:
    """How to fine-tune an MoE model, relative to what works for the dense one.

    Attributes:
        learning_rate: Factor on the dense model's learning rate.
        batch_size: Factor on the dense model's batch size.
        dropout: Dropout outside the experts.
        expert_dropout: Dropout inside the experts; None leaves it as it is.
        frozen: The part that is not trained, or None.
    """

    learning_rate: float = 1.0
    batch_size: float = 1.0
    dropout: float = 0.1
    expert_dropout: float | None = None
    frozen: ModelPart | None = None

    @classmethod
    def switch(cls) -> FineTuning:
        """Return the settings of Switch Transformer: dropout 0.4 inside the experts, 0.1 elsewhere.

        Each expert sees fewer tokens than a dense FFN. Fedus et al. 2021, Table 4: better than 0.1 everywhere on GLUE
        (85.2 against 84.7) and CNN/DailyMail (19.6 against 19.1).
        """
        return cls(dropout=0.1, expert_dropout=0.4)

    @classmethod
    def st_moe(cls) -> FineTuning:
        """Return the settings of ST-MoE: smaller batches and a higher learning rate than for the dense model.

        Zoph et al. 2022: MoE models gain from both where dense ones lose. The paper sweeps values for its own models;
        the factors here, a quarter of the batch and twice the rate, are ours.
        """
        return cls(learning_rate=2.0, batch_size=0.25)

    @classmethod
    def frozen_experts(cls) -> FineTuning:
        """Return settings that train everything but the MoE layers: less memory, about the same quality.

        ST-MoE: freezing the MoE layers was nearly as good as training everything; training only them was worse.
        """
        return cls(frozen="moe")

    def prepare(self, model: nn.Module) -> None:
        """Set the experts' dropout and freeze; rates, batches and the other dropout are up to the script.

        Raises:
            RefusedError: The experts are transformers' own, which have no dropout.
        """
        if self.expert_dropout is not None:
            for layer in layers_of(model).values():
                _set_dropout(layer, self.expert_dropout)
        if self.frozen is not None:
            freeze(model, self.frozen)


def _set_dropout(layer: FoundLayer, dropout: float) -> None:
    modules = [inner for part in (*layer.experts, *layer.shared) for inner in part.modules()]
    stacks = [getattr(inner, "stacked", inner) for inner in modules]  # of experts as linears, which ask it
    ours = [stack for stack in stacks if isinstance(stack, Experts)]
    if not ours:
        raise RefusedError(f"the experts of {layer.path} have no dropout: use a recipe whose expert_dropout is None")
    for stack in ours:
        stack.dropout = dropout


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Attributes:
        tasks: "many", mixed in each batch, each with an instruction that names it, or "one".
        how: Settings of the stage.
    """

    tasks: str
    how: FineTuning


# FLAN-MoE (Shen et al. 2023, arXiv:2305.14705): after fine-tuning on one task directly, MoE models are worse than dense
# ones of the same cost; with instruction tuning on many tasks before it they are better.
INSTRUCTION_FIRST = (Stage("many", FineTuning.st_moe()), Stage("one", FineTuning.switch()))
