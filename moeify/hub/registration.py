"""Tell transformers about moeify: checkpoints in moeify format load with `from_pretrained`.

A checkpoint in moeify format is that of its dense class: same `model_type`, same `architectures`. Its config holds the
plan besides, in a field of its own, so that the slot for quantization stays free. Whatever makes a model from such a
config (`from_pretrained`, `from_config`, the class itself) calls the class's `__new__`; that is where `register` has
the layers of the plan put in place. Where it was not called, transformers stops at an unknown implementation of
experts, whose name says what to do.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any, NoReturn, cast

from transformers import PreTrainedConfig, PreTrainedModel, modeling_utils
from transformers.initialization import no_init_weights
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from moeify.contract.forms import loading_rules
from moeify.contract.linearize import linearize
from moeify.contract.model import remember
from moeify.contract.stock_experts import offer_stock_experts
from moeify.conversion.dense import Dense
from moeify.conversion.module import put_layers
from moeify.errors import CheckpointError
from moeify.hub.distribution import offer_distribution
from moeify.hub.quantizing import offer_quantization
from moeify.layers.implementations import OURS
from moeify.plan import ASK_FOR_MOEIFY, FIELD, LINEAR, OLDER_FORMAT, Plan, stored_plan


class OlderFormat(QuantizationConfigMixin):
    """A plan in the place of a quantization, which transformers would pass over: refused."""

    @classmethod
    def from_dict(cls, *_: object, **__: object) -> NoReturn:
        """Refuse it.

        Raises:
            CheckpointError: Always.
        """
        raise CheckpointError(f"the checkpoint cannot be loaded: {OLDER_FORMAT}")


def register(check: Callable[[Plan], None] | None = None) -> None:
    """Make `from_pretrained` read moeify checkpoints and `experts_implementation="moeify"` use our operator.

    Calling it again changes nothing.

    Args:
        check: Is called with the plan of each model before it is made, and may raise.
    """

    def new(cls: type[PreTrainedModel], *args: Any, **kwargs: Any) -> PreTrainedModel:
        return _new(check, cls, *args, **kwargs)

    untyped: Any = PreTrainedModel
    untyped.__new__ = staticmethod(new)
    modeling_utils.get_model_conversion_mapping = loading_rules  # type: ignore[attr-defined]
    AUTO_QUANTIZATION_CONFIG_MAPPING[FIELD] = OlderFormat
    offer_stock_experts()
    offer_distribution()
    offer_quantization()


def _new(
    check: Callable[[Plan], None] | None, cls: type[PreTrainedModel], *args: Any, **kwargs: Any
) -> PreTrainedModel:
    """Make an empty model, whose `__init__` also puts the layers of the plan in place if its config has one."""
    made: Any = cls
    config = next((value for value in (*args[:1], kwargs.get("config")) if isinstance(value, PreTrainedConfig)), None)
    plan = None if config is None else stored_plan(vars(config))
    if plan is not None and check is not None:
        check(Plan.from_dict(plan))
    if config is not None and config._experts_implementation == ASK_FOR_MOEIFY and plan is None:
        if hasattr(config, "quantization_config"):  # a stock model that `moeify.quantize_experts` quantized
            config._experts_implementation = OURS
        else:
            made = _rebuilding(made)  # it says what is missing
    elif plan is not None:
        made = _rebuilding(made)
    return cast("PreTrainedModel", object.__new__(made))


@cache
def _rebuilding(cls: type[Any]) -> type[Any]:
    """Return a subclass that makes a model of the class `cls` from the config of a converted one."""

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        entry: Any = vars(config).get(FIELD)
        plan = _take_plan(cls, config)  # the models inside this one are made from the same config, and stay dense
        asked = config._experts_implementation
        config._experts_implementation = OURS  # whatever it is, the dense class would refuse it
        try:
            cls.__init__(self, config, *args, **kwargs)
        finally:
            setattr(config, FIELD, entry)
        self.__class__ = cls
        _rebuild(self, plan)
        if entry.get(LINEAR):
            linearize(self)
        if asked not in {None, ASK_FOR_MOEIFY}:
            self.set_experts_implementation(asked)

    body = {"__init__": init, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), body)


def _take_plan(cls: type[PreTrainedModel], config: PreTrainedConfig) -> Plan:
    """Take the plan out of a config.

    Raises:
        CheckpointError: There is none: the config is a part of that of a converted model.
        ConfigError: It is damaged, or another version of moeify wrote it.
    """
    entry = stored_plan(vars(config))
    if entry is None:
        raise CheckpointError(
            f"this config of a {cls.__name__} belongs to a converted model and has no plan of its own: load the whole "
            "model and take the part"
        )
    plan = Plan.from_dict(entry)
    delattr(config, FIELD)
    return plan


def _rebuild(model: PreTrainedModel, saved: Plan) -> None:
    """Put the layers of a plan into a model, which may have a head where the saved one had none.

    Raises:
        CheckpointError: The model has none of the FFNs that were converted.
    """
    plan = _renamed(model, saved)
    custom = any(site.activation == "custom" for site in plan.sites)
    regions = Dense(model).regions if custom else {}
    untyped: Any = model
    routers = {rf"{re.escape(site.path)}\.router" for site in plan.sites}
    untyped._keep_in_fp32_modules_strict = {*(untyped._keep_in_fp32_modules_strict or ()), *routers}
    put_layers(model, plan, regions)
    remember(model.config, plan)
    _pass_over_initializers(model, plan)


def _pass_over_initializers(model: PreTrainedModel, plan: Plan) -> None:
    """Mark modules as initialized whose initializers reach into an FFN that is gone.

    All others must run: some compute buffers of the modules inside them, which no file holds.
    """
    around = (site.path.split(".")[:-1] for site in plan.sites)
    with no_init_weights():  # it is only tried
        for path in sorted({".".join(names[:end]) for names in around for end in range(len(names) + 1)}):
            module: Any = model.get_submodule(path)
            parents = (model.get_submodule(".".join(path.split(".")[:end])) for end in range(path.count(".") + 2))
            owner: Any = [each for each in (model, *parents) if isinstance(each, PreTrainedModel)][-1]
            try:
                owner._init_weights(module)
            except AttributeError:
                module._is_hf_initialized = True


def _renamed(model: PreTrainedModel, saved: Plan) -> Plan:
    held = (model.named_modules(), model.named_parameters(), model.named_buffers())
    names = {name for group in held for name, _ in group}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."

    def rename(name: str) -> str | None:
        return next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in names), None)

    plan = saved.renamed(rename)
    if not plan.sites:
        raise CheckpointError(f"{type(model).__name__} has no {saved.sites[0].path}: the checkpoint is not its own")
    return plan
