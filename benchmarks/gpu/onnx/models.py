"""Small models whose every layer counts, the inputs that they are compared on, and PyTorch's side of the comparison."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import moeify
from benchmarks.gpu.onnx.sessions import KINDS, Bound, Session
from benchmarks.gpu.run import Run
from moeify.export.lower.weights import quantize

_transformers: Any = transformers  # for its untyped parts
VOCAB = 512
CONVERTED = ("gpt2", "bert", "bert_exact")  # dense models that moeify converts; the others are MoEs of transformers


def build(name: str, small: bool) -> Any:
    """Return a model in float32 and evaluation mode, the same in every process."""
    torch.manual_seed(7)
    model = _FACTORIES[name](small)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            _draw(name, key, parameter, generator)
    if name in CONVERTED:
        noise = moeify.methods.Noise(share=0.5, std=0.05)
        moeify.convert(model, moeify.MoEConfig(experts=4, top_k=2, method=noise))
    return model.eval()


def _draw(name: str, key: str, parameter: Tensor, generator: torch.Generator) -> None:
    """Give a parameter values under which it matters."""
    if parameter.dim() >= 2:
        transposed = (name == "gptoss" and parameter.dim() == 3) or (
            name == "gpt2" and "wte" not in key and "wpe" not in key
        )
        clamped = name == "gptoss" and "gate_up" in key and parameter.dim() == 3
        fan_in = parameter.shape[-2 if transposed else -1]
        std = 1.0 if "embed" in key or "wte" in key else (3.0 if clamped else 1.0) * fan_in**-0.5
        parameter.normal_(0, std, generator=generator)
    elif "bias" in key and "norm" not in key.lower() and "ln_" not in key:
        parameter.normal_(0, 0.1, generator=generator)


def _body(small: bool, layers: int) -> dict[str, Any]:
    """Return the settings that the decoders share."""
    sizes = (64, 2, 1, 1) if small else (1024, 8, 2, layers)
    names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
    common = {
        "vocab_size": VOCAB,
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return dict(zip(names, sizes, strict=True)) | common | {"use_cache": True}


def _mixtral(small: bool) -> Any:
    config = _transformers.MixtralConfig(
        **_body(small, 4), intermediate_size=128 if small else 2048, num_local_experts=4 if small else 8,
        num_experts_per_tok=2,
    )  # fmt: skip
    return _transformers.MixtralForCausalLM(config)


def _dense(small: bool) -> Any:
    config = _transformers.MistralConfig(
        **_body(small, 4), intermediate_size=256 if small else 4096, sliding_window=None
    )
    return _transformers.MistralForCausalLM(config)


def _qwen3(small: bool) -> Any:
    config = _transformers.Qwen3MoeConfig(
        **_body(small, 2), head_dim=8 if small else 128, moe_intermediate_size=64 if small else 512,
        num_experts=16 if small else 32, num_experts_per_tok=4, norm_topk_prob=True,
    )  # fmt: skip
    return _transformers.Qwen3MoeForCausalLM(config)


def _shared(small: bool) -> Any:
    config = _transformers.Qwen2MoeConfig(
        **_body(small, 2), moe_intermediate_size=64 if small else 512, num_experts=8 if small else 16,
        shared_expert_intermediate_size=128 if small else 2048, num_experts_per_tok=2,
    )  # fmt: skip
    return _transformers.Qwen2MoeForCausalLM(config)


def _gptoss(small: bool) -> Any:
    config = _transformers.GptOssConfig(
        **_body(small, 2), head_dim=8 if small else 128, intermediate_size=64 if small else 512,
        num_local_experts=4 if small else 8, num_experts_per_tok=2,
    )  # fmt: skip
    return _transformers.GptOssForCausalLM(config)


def _gpt2(small: bool) -> Any:
    config = _transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32 if small else 512, n_layer=2, n_head=2, n_positions=1024
    )
    return _transformers.GPT2LMHeadModel(config)


def _bert(small: bool, activation: str = "gelu_new") -> Any:
    hidden = 32 if small else 512
    config = _transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=2, num_attention_heads=2,
        hidden_act=activation,
    )  # fmt: skip
    return _transformers.BertModel(config, add_pooling_layer=False)


def _bert_exact(small: bool) -> Any:
    return _bert(small, "gelu")


_FACTORIES = {
    "mixtral": _mixtral, "dense": _dense, "qwen3": _qwen3, "shared": _shared, "gptoss": _gptoss, "gpt2": _gpt2,
    "bert": _bert, "bert_exact": _bert_exact,
}  # fmt: skip


@torch.no_grad()
def round_experts(model: nn.Module, name: str, bits: int, block: int | None) -> None:
    """Put into a model what its quantized graph computes with."""
    for key, parameter in model.named_parameters():
        if parameter.dim() == 3 and "experts" in key:
            weights = parameter.transpose(1, 2) if name == "gptoss" else parameter
            values = quantize(weights.contiguous(), bits, block).dequantized()
            parameter.copy_(values.transpose(1, 2) if name == "gptoss" else values)


@torch.no_grad()
def forward(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the logits or states of a whole forward pass without a cache, in float32."""
    known = inspect.signature(model.forward).parameters
    device = next(model.parameters()).device
    arguments: dict[str, Any] = {name: value.to(device) for name, value in inputs.items() if name in known}
    output = model(**arguments, **({"use_cache": False} if "use_cache" in known else {}))
    result: Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return result.float()


def text_inputs(batch: int, length: int, padding: int, seed: int) -> dict[str, Tensor]:
    """Return token ids, mask, positions and segments; the first row begins with padding."""
    ids = torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions,
        "token_type_ids": torch.zeros_like(ids),
    }


def is_decoder(session: Session) -> bool:
    """Whether an exported model takes keys and values."""
    return any(argument.name.startswith("past_key_values.") for argument in session.get_inputs())


def cache_inputs(run: Run, session: Session, batch: int, past: int) -> dict[str, Tensor]:
    """Return keys and values for an exported decoder: normal numbers."""
    made = {}
    for number, argument in enumerate(session.get_inputs()):
        if argument.name.startswith("past_key_values."):
            generator = torch.Generator().manual_seed(number)
            shape = (batch, argument.shape[1], past, argument.shape[3])
            made[argument.name] = torch.randn(shape, generator=generator).to(run.device, KINDS[argument.type][0])
    return made


def one_more_token(run: Run, session: Session, batch: int, past: int, seed: int = 5) -> dict[str, Tensor]:
    """Return the inputs of a decoding step: one new token for each row, and what came before."""
    whole = text_inputs(batch, past + 1, 0, seed)
    step = {name: value if name == "attention_mask" else value[:, -1:] for name, value in whole.items()}
    return step | {n: t.roll(seed, dims=2) for n, t in cache_inputs(run, session, batch, past).items()}


def in_pieces(run: Run, session: Session, inputs: Mapping[str, Tensor], pieces: Sequence[int]) -> Tensor:
    """Feed an exported decoder piece by piece with its own keys and values; return all logits in float32."""
    start, logits = 0, []
    state = cache_inputs(run, session, inputs["input_ids"].shape[0], 0)
    for size in pieces:
        stop = start + size
        piece = {n: t[:, :stop] if n == "attention_mask" else t[:, start:stop] for n, t in inputs.items()}
        outputs = Bound(run, session, piece | state).run()
        logits.append(outputs["logits"].float().clone())
        state = {name: outputs[name.replace("past_key_values", "present")].clone() for name in state}
        start = stop
    return torch.cat(logits, dim=1)
