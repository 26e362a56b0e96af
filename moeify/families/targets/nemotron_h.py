"""Nemotron-H: state-space, attention and FFN blocks in turns; a sigmoid router, experts with relu² and no gate.

Any FFN block can stay dense. On disk the model is called `backbone`.
"""

from __future__ import annotations

from moeify.families.base import (
    DOWN,
    EXLLAMA,
    LLAMA_CPP,
    MLX,
    SGLANG,
    TRANSFORMERS,
    TRT,
    UP_ALONE,
    VLLM,
    Config,
    Family,
    Fields,
    Pair,
    Rewrite,
    SharedWeight,
    expert_size,
    layer_count,
    layer_number,
    router,
    selection_bias,
)
from moeify.families.conditions import NO_MLP_BIAS
from moeify.families.gated import IDLE, shared_size
from moeify.families.hybrid import hub_kinds
from moeify.families.sigmoid import OPTIONS
from moeify.plan import Plan

_MOE = "backbone.layers.{layer}.mixer"
_LETTERS = {"mamba": "M", "attention": "*", "mlp": "-", "moe": "E"}


def _fields(plan: Plan, config: Config) -> Fields:
    converted = {layer_number(site) for site in plan.sites}
    kinds = hub_kinds("moe" if layer in converted else kind for layer, kind in enumerate(config["layers_block_type"]))
    chosen = {name: getattr(plan.config.router, name) for name in sorted(OPTIONS)}
    return {
        "num_hidden_layers": layer_count(config),
        "layers_block_type": kinds,
        "hybrid_override_pattern": "".join(_LETTERS.get(kind, "?") for kind in kinds),  # engines read this one
        "n_routed_experts": plan.config.experts,
        "n_shared_experts": 1,  # one wide FFN: SGLang multiplies its size by this
        "mamba_n_groups": config["n_groups"],  # as SGLang calls it
        "num_experts_per_tok": plan.config.top_k,
        "moe_intermediate_size": expert_size(plan),
        "moe_shared_expert_intermediate_size": shared_size(plan),
        "moe_latent_size": None,
        "norm_topk_prob": plan.config.renormalize,
        "output_router_logits": False,
        **chosen,
    }


FAMILY = Family(
    model_type="nemotron_h",
    architecture="NemotronHForCausalLM",
    sources={
        "nemotron_h": Pair(
            (NO_MLP_BIAS,),
            rewrites=(Rewrite(r"model\.(.*)", {r"backbone.\1": lambda tensor, config: tensor}),),
            activation="relu2",
        )
    },
    tensors={
        f"{_MOE}.gate.weight": router,
        f"{_MOE}.gate.e_score_correction_bias": selection_bias,
        f"{_MOE}.experts.{{expert}}.up_proj.weight": UP_ALONE,
        f"{_MOE}.experts.{{expert}}.down_proj.weight": DOWN,
        f"{_MOE}.shared_experts.up_proj.weight": SharedWeight(UP_ALONE, IDLE),
        f"{_MOE}.shared_experts.down_proj.weight": SharedWeight(DOWN, IDLE),
    },
    fields=_fields,
    engines=(TRANSFORMERS, VLLM, SGLANG, LLAMA_CPP, MLX, EXLLAMA, TRT),
    dense="any",
    router="sigmoid",
    options=OPTIONS,
    gated=False,
    renormalizes=False,
    shared=True,
)
