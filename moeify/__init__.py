"""moeify: turn a dense PyTorch transformer into a sparse Mixture-of-Experts, with a proof.

Importing this package loads neither torch nor transformers: each public name is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeify import methods, routers
    from moeify.config import MoEConfig
    from moeify.contract.linearize import linearize, stack
    from moeify.conversion.dense import find_ffns
    from moeify.conversion.graph import convert_graph
    from moeify.conversion.module import convert
    from moeify.errors import MoeifyError
    from moeify.export.onnx_file import export_onnx
    from moeify.export.report import OnnxReport
    from moeify.hub.loading import load
    from moeify.hub.quantizing import quantize_experts
    from moeify.hub.registration import register
    from moeify.parallel.clipping import clip_grad_norm_
    from moeify.parallel.saving import save
    from moeify.parallel.shard import parallelize
    from moeify.plan import Plan
    from moeify.proving.proof import verify
    from moeify.proving.report import VerifyReport
    from moeify.training.bias import attach_bias_update, update_selection_bias
    from moeify.training.callback import RoutingCallback
    from moeify.training.control import freeze, param_groups, set_capacity
    from moeify.training.layers_of import track_routing
    from moeify.training.losses import aux_loss, scale_attached_losses
    from moeify.training.stats import LayerStats, routing_stats

__version__ = "0.1.0"

# No module may have the name of a public function: importing it would put the module in the function's place.
_HOME = {
    "LayerStats": "training.stats",
    "MoEConfig": "config",
    "MoeifyError": "errors",
    "OnnxReport": "export.report",
    "Plan": "plan",
    "RoutingCallback": "training.callback",
    "VerifyReport": "proving.report",
    "attach_bias_update": "training.bias",
    "aux_loss": "training.losses",
    "clip_grad_norm_": "parallel.clipping",
    "convert": "conversion.module",
    "convert_graph": "conversion.graph",
    "export_onnx": "export.onnx_file",
    "find_ffns": "conversion.dense",
    "freeze": "training.control",
    "linearize": "contract.linearize",
    "load": "hub.loading",
    "parallelize": "parallel.shard",
    "param_groups": "training.control",
    "quantize_experts": "hub.quantizing",
    "register": "hub.registration",
    "routing_stats": "training.stats",
    "save": "parallel.saving",
    "scale_attached_losses": "training.losses",
    "set_capacity": "training.control",
    "stack": "contract.linearize",
    "track_routing": "training.layers_of",
    "update_selection_bias": "training.bias",
    "verify": "proving.proof",
}

_PACKAGES = {"methods", "routers"}

__all__ = [
    "LayerStats",
    "MoEConfig",
    "MoeifyError",
    "OnnxReport",
    "Plan",
    "RoutingCallback",
    "VerifyReport",
    "attach_bias_update",
    "aux_loss",
    "clip_grad_norm_",
    "convert",
    "convert_graph",
    "export_onnx",
    "find_ffns",
    "freeze",
    "linearize",
    "load",
    "methods",
    "parallelize",
    "param_groups",
    "quantize_experts",
    "register",
    "routers",
    "routing_stats",
    "save",
    "scale_attached_losses",
    "set_capacity",
    "stack",
    "track_routing",
    "update_selection_bias",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"moeify.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'moeify' has no attribute {name!r}")
    return getattr(import_module(f"moeify.{_HOME[name]}"), name)
