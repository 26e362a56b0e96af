"""Tell transformers about moeify: checkpoints in moeify format load with `from_pretrained`.

transformers lets a checkpoint's `quantization_config` name a class that rebuilds the model before weights are loaded.
That is what a converted model needs, so the moeify format uses it: the config holds the plan, and this module puts the
`SparseMoE` layers in place on the meta device. The config also asks for the experts implementation "moeify", because
of an unknown quantization method transformers only warns: without `register` it stops, instead of loading half a model.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moeify.contract.stock_experts import offer_stock_experts
from moeify.conversion.dense import Dense
from moeify.conversion.module import remember_plan
from moeify.conversion.restructure import restructure
from moeify.errors import CheckpointError
from moeify.plan import Plan

FORMAT = "moeify"


class MoeifyFormat(QuantizationConfigMixin):
    """The entry in a checkpoint's config: the plan, as data."""

    def __init__(self, plan: dict[str, Any], **_: Any) -> None:
        self.quant_method: Any = FORMAT
        self.plan = plan


class MoeifyLoader(HfQuantizer):
    """Rebuilds the layers before the weights are loaded; afterwards the model is an ordinary one."""

    quantization_config: MoeifyFormat

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        plan = self.plan_for(model)
        custom = any(site.activation == "custom" for site in plan.sites)
        regions = Dense(model).regions if custom else {}
        if kept := plan.config.router.kept_in_float32:
            untyped: Any = model
            untyped._keep_in_fp32_modules_strict = {*(untyped._keep_in_fp32_modules_strict or ()), *kept}
        return restructure(model, plan, regions)

    def postprocess_model(self, model: nn.Module, **_: Any) -> nn.Module:
        """Leave an ordinary model that trains and saves, with the plan in its config."""
        plan = self.plan_for(model)
        untyped: Any = self
        untyped.remove_quantization_config(model)
        remember_plan(model, plan)
        return model

    def plan_for(self, model: nn.Module) -> Plan:
        """Return the plan in the names of the model that is loaded, which may have a head where the saved one had none.

        Raises:
            CheckpointError: The model has none of the FFNs that were converted.
        """
        saved = Plan.from_dict(self.quantization_config.plan)
        names = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
        prefix = f"{getattr(model, 'base_model_prefix', '')}."

        def rename(name: str) -> str | None:
            return next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in names), None)

        plan = saved.renamed(rename)
        if not plan.sites:
            raise CheckpointError(f"{type(model).__name__} has no {saved.sites[0].path}: the checkpoint is not its own")
        return plan

    def is_serializable(self) -> bool:
        """Saving is transformers' own."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Every weight is a plain parameter."""
        return True


def register() -> None:
    """Make `from_pretrained` read moeify checkpoints and `experts_implementation="moeify"` use our operator.

    Calling it again changes nothing.
    """
    if FORMAT not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(FORMAT)(MoeifyLoader)
        register_quantization_config(FORMAT)(MoeifyFormat)
    offer_stock_experts()
