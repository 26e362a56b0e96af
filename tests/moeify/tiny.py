"""The dozen architectures that must always work, tiny and random, with sizes that are multiples of nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from moeify.checkpoint.source import open_source
from moeify.config import MoEConfig
from moeify.conversion.checkpoint import Callbacks, Output, convert_checkpoint, plan_checkpoint
from moeify.conversion.dense import DenseCheckpoint
from moeify.conversion.module import convert
from moeify.plan import Plan

tf: Any = transformers  # its types are stricter than its configurations are meant
HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 36, 57, 3, 101
_SIZES = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS,
          "num_attention_heads": 3, "vocab_size": VOCABULARY}  # fmt: skip
_LLAMA = {**_SIZES, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_T5 = {"d_model": HIDDEN, "d_ff": INTERMEDIATE, "d_kv": 12, "num_heads": 3, "num_layers": 2, "num_decoder_layers": 1,
       "vocab_size": VOCABULARY}  # fmt: skip

MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_LLAMA, tie_word_embeddings=True)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**_LLAMA, sliding_window=4)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_LLAMA)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_LLAMA, head_dim=10)),
    "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**_LLAMA, head_dim=10)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**_LLAMA)),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(
            n_layer=LAYERS,
            n_embd=HIDDEN,
            n_inner=INTERMEDIATE,
            n_head=3,
            vocab_size=VOCABULARY,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(
            num_hidden_layers=LAYERS,
            hidden_size=HIDDEN,
            ffn_dim=INTERMEDIATE,
            num_attention_heads=3,
            vocab_size=VOCABULARY,
            word_embed_proj_dim=HIDDEN,
            eos_token_id=2,
        )
    ),
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**_SIZES, bos_token_id=1, eos_token_id=2)),
    "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**_T5)),
    "t5_gated": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**_T5, feed_forward_proj="gated-gelu")),
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**_SIZES)),
    "vit": lambda: tf.ViTForImageClassification(
        tf.ViTConfig(
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=LAYERS,
            num_attention_heads=3,
            image_size=16,
            patch_size=4,
        )
    ),
}


def draw(model: Any, std: float = 0.15) -> Any:
    """Give the trained matrices of a model random values, and return it."""
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter.requires_grad:
            nn.init.normal_(parameter, std=std)
    return model


def differing_moe() -> nn.Module:
    """A converted Llama whose experts and routers differ."""
    model = convert(build("llama"), MoEConfig(4, 2))
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if ".experts." in name or ".router." in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def mixtral(**sizes: int) -> Any:
    """A stock MoE."""
    usual = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 1, "vocab_size": VOCABULARY, "num_local_experts": 4}  # fmt: skip
    return tf.MixtralForCausalLM(tf.MixtralConfig(**usual | sizes)).eval()


def tokenizer(*special: str, **named: str) -> Any:
    """A tokenizer of the words w0, w1, … after some special ones, which are also given by what they are for."""
    words = [*special, *(f"w{number}" for number in range(VOCABULARY - len(special)))]
    plain = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tf.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token=words[0], **named)


def build(name: str, seed: int = 0) -> nn.Module:
    """A model whose logits are of order 1 and depend on every weight."""
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.15)
        else:
            nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.1)
    return model


def inputs(name: str) -> dict[str, Tensor]:
    """Inputs of another shape than the one that tracing uses."""
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn(3, 3, 16, 16, generator=generator)}
    ids = torch.randint(0, VOCABULARY, (3, 13), generator=generator)
    return {"input_ids": ids, "decoder_input_ids": ids[:, :5]} if name.startswith("t5") else {"input_ids": ids}


@torch.no_grad()
def logits(model: nn.Module, name: str) -> Tensor:
    """The logits on `inputs(name)`."""
    output: Any = model(**inputs(name))
    result: Tensor = output.logits
    return result


def relative(result: Tensor, expected: Tensor) -> float:
    """The library's yardstick: the largest difference over the largest value."""
    return float((result - expected).abs().max() / expected.abs().max())


def save(model: Any, folder: Path, **kwargs: Any) -> Path:
    """Write a checkpoint as users have it."""
    model.save_pretrained(folder, **kwargs)
    return folder


def enable_checkpointing(model: Any, options: dict[str, Any] | None = None) -> None:
    """Turn activation checkpointing on, under the name that this transformers has for it."""
    name = "activation_checkpointing_enable"
    (getattr(model, name, None) or model.gradient_checkpointing_enable)(options)


def convert_files(
    src: Path, dst: Path, config: MoEConfig, *, layers: str = "all", target: str = "auto", **options: Any
) -> Plan:
    """Convert a checkpoint without a proof."""
    callbacks, shard_size = options.pop("callbacks", Callbacks()), options.pop("shard_size", 10**9)
    with open_source(src) as source:
        dense = DenseCheckpoint(source)
        plan = plan_checkpoint(dense, config, layers, target)
        convert_checkpoint(dense, plan, Output(dst, shard_size, **options), callbacks)
    return plan
