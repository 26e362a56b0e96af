"""Tiny random MoE models of transformers' own, and what they are called with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from moeify.contract.found import find_layers
from tests.moeify import tiny

tf: Any = transformers
EXPERTS, TOP_K, VOCABULARY = 6, 2, 101
OLD = Version(transformers.__version__) < Version("5.24")  # what some routers return differs
# Where a router's logits are in what it returns, and its choices; None where it returns no more than logits. What is
# not named here returns both: first logits, last choices. Switch's old router does not return its logits.
_GRANITE = (2, 0) if OLD else (0, 2)
_PLACES = {"llama4": (1, None), "jetmoe": (4, None), "dbrx": (0, None), "switch": (None, 1 if OLD else 0),
           "nllb": (2, None), "jamba": (0, None if OLD else 2), "granitemoe": _GRANITE,
           "granitemoeshared": _GRANITE}  # fmt: skip
_TEXT = {"vocab_size": VOCABULARY, "hidden_size": 36, "intermediate_size": 57, "num_hidden_layers": 3,
         "num_attention_heads": 3, "num_key_value_heads": 1, "num_experts_per_tok": TOP_K, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
_E = {"num_experts": EXPERTS}
_LOCAL = {"num_local_experts": EXPERTS}
_SMALL = {"moe_intermediate_size": 23}
_GROUPS = {"n_group": 2, "topk_group": 1, "n_routed_experts": EXPERTS, "n_shared_experts": 1,
           "first_k_dense_replace": 1,
           **_SMALL}  # fmt: skip
_MLA = {"kv_lora_rank": 8, "q_lora_rank": 12, "qk_rope_head_dim": 4, "v_head_dim": 12, "qk_nope_head_dim": 8,
        "num_key_value_heads": 3}  # fmt: skip
_T5 = {"d_model": 36, "d_ff": 57, "d_kv": 12, "num_heads": 3, "num_layers": 4, "num_decoder_layers": 2, **_E,
       "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 1, "vocab_size": VOCABULARY}  # fmt: skip
_NLLB = {"vocab_size": VOCABULARY, "d_model": 36, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 57,
         "decoder_ffn_dim": 57, "encoder_attention_heads": 3, "decoder_attention_heads": 3, "encoder_sparse_step": 2,
         "decoder_sparse_step": 2, "pad_token_id": 0, **_E}  # fmt: skip
_DBRX = {"d_model": 36, "n_heads": 3, "n_layers": 2, "max_seq_len": 64, "vocab_size": VOCABULARY,
         "attn_config": {"kv_n_heads": 1, "rope_theta": 1e4, "clip_qkv": 8},
         "ffn_config": {"ffn_hidden_size": 57, "moe_num_experts": EXPERTS, "moe_top_k": TOP_K,
                        "hidden_size": 36}}  # fmt: skip


def _causal(name: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        cls = getattr(tf, f"{name}ForCausalLM")
        model: nn.Module = cls(cls.config_class(**{**_TEXT, **settings}))
        return model

    return build


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mixtral": _causal("Mixtral", **_LOCAL),
    "qwen2_moe": _causal("Qwen2Moe", **_E, **_SMALL, shared_expert_intermediate_size=31),
    "qwen3_moe": _causal("Qwen3Moe", **_E, **_SMALL, head_dim=12, mlp_only_layers=[1]),
    "olmoe": _causal("Olmoe", **_E),
    "deepseek_v2": _causal("DeepseekV2", **{**_GROUPS, **_MLA}, topk_method="greedy"),
    "deepseek_v3": _causal("DeepseekV3", **{**_GROUPS, **_MLA}),
    "gpt_oss": _causal("GptOss", **_LOCAL, head_dim=12),
    "llama4": _causal("Llama4", **_LOCAL, head_dim=12, intermediate_size_mlp=57),
    "granitemoe": _causal("GraniteMoe", **_LOCAL),
    "granitemoeshared": _causal("GraniteMoeShared", **_LOCAL, shared_intermediate_size=31),
    "ernie4_5_moe": _causal("Ernie4_5_Moe", moe_num_experts=EXPERTS, moe_k=TOP_K, **_SMALL),
    "glm4_moe": _causal("Glm4Moe", **_GROUPS, head_dim=12),
    "phimoe": _causal("Phimoe", **_LOCAL),
    "jamba": _causal("Jamba", **_E, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False),
    "dbrx": lambda: tf.DbrxForCausalLM(tf.DbrxConfig(**_DBRX)),
    "jetmoe": _causal("JetMoe", **_LOCAL, kv_channels=12),
    "switch": lambda: tf.SwitchTransformersForConditionalGeneration(tf.SwitchTransformersConfig(**_T5)),
    "nllb": lambda: tf.NllbMoeForConditionalGeneration(tf.NllbMoeConfig(**_NLLB)),
}


def build(name: str, seed: int = 0) -> Any:
    """A model whose routing is undecided nowhere and even nowhere."""
    torch.manual_seed(seed)
    model = tiny.draw(MODELS[name]().eval())
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the default wants whole 16 bytes
    return model


def inputs(name: str) -> dict[str, Tensor]:
    """Two sequences without padding."""
    ids = torch.randint(3, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "decoder_input_ids": ids[:, :5]} if name in {"switch", "nllb"} else {"input_ids": ids}


class Heard:
    """What the routers of a model return, as their own code gives it, from hooks of this class.

    Attributes:
        logits: The router logits (T, E) of each layer.
        choices: The chosen experts of each token, None where nothing but the logits tells them.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.logits: dict[str, Tensor] = {}
        self.choices: dict[str, list[set[int]] | None] = {}
        self._logits_at, self._choices_at = _PLACES.get(name, (0, 2))
        self._hooks = []
        for path, layer in find_layers(model).items():
            router: Any = layer.router
            self._hooks.append(router.register_forward_hook(self._keeper(path)))
            if self._logits_at is None:
                self._hooks.append(router.classifier.register_forward_hook(self._logits_keeper(path)))

    def remove(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()

    def _keeper(self, path: str) -> Callable[..., None]:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            parts = output if isinstance(output, tuple) else (output,)
            if self._logits_at is not None:
                self.logits[path] = parts[self._logits_at].reshape(-1, EXPERTS)
            self.choices[path] = None if self._choices_at is None else _sets(parts[self._choices_at])

        return keep

    def _logits_keeper(self, path: str) -> Callable[..., None]:
        def keep(_: nn.Module, __: Any, output: Tensor) -> None:
            self.logits[path] = output.reshape(-1, EXPERTS)

        return keep


def _sets(chosen: Tensor) -> list[set[int]]:
    """The experts of each token, from their numbers or from a mask of them."""
    if chosen.shape[-1] == EXPERTS:
        return [{int(row.argmax())} for row in chosen.reshape(-1, EXPERTS)]
    return [set(row.tolist()) for row in chosen]
