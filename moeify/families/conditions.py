"""What must hold of a dense config in more than one family, and the words for when it does not."""

from __future__ import annotations

from moeify.families.base import Condition, Config, head_dim


def equal(field: str, value: object, why: str) -> Condition:
    """Return the condition that a field has a value, which it has too where it is missing."""
    return Condition(lambda config: config.get(field, value) == value, f"its config has {field} ≠ {value}: {why}")


def always(note: str) -> Condition:
    """Return what is to be said of every config."""
    return Condition(lambda config: False, note)


def _rotary_share(config: Config) -> float:
    parameters = config.get("rope_parameters") or {}
    return float(parameters.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0)


def _rope_type(config: Config) -> str:
    return str((config.get("rope_parameters") or {}).get("rope_type", "default"))


def slides(config: Config) -> bool:
    """Whether some layer has a window, if the config says how long it is."""
    return "sliding_attention" in (config.get("layer_types") or ["sliding_attention"])


LANGUAGE_MODEL = Condition(
    lambda config: all(str(name).endswith("ForCausalLM") for name in config.get("architectures") or ()),
    "its architecture is not a language model (…ForCausalLM), and that is what the format holds",
)
NO_ATTENTION_BIAS = equal("attention_bias", False, "the format has no attention biases")
NO_OUTPUT_BIAS = equal("attention_bias", False, "the format has no bias of o_proj")
NO_MLP_BIAS = equal("mlp_bias", False, "the experts have no biases")
FULL_ATTENTION = Condition(
    lambda config: all(kind == "full_attention" for kind in config.get("layer_types") or ()),
    "some of its layers use sliding-window attention, which the format cannot say",
)
NO_SLIDING_WINDOW = equal("sliding_window", None, "the format has no sliding window in this form")
ONE_WINDOW = Condition(
    lambda config: len(set(config.get("layer_types") or ())) < 2,
    "some of its layers use sliding-window attention and some do not, which the format cannot say",
)
ALL_ROTATE = Condition(
    lambda config: all(config.get("no_rope_layers") or ()),
    "some of its layers have no rotary positions (no_rope_layers), which the format cannot say",
)
PLAIN_HEAD_DIM = Condition(
    lambda config: head_dim(config) == config["hidden_size"] // config["num_attention_heads"],
    "its head_dim is not hidden_size / num_attention_heads, which the format takes for granted",
)
WHOLE_ROTARY = Condition(
    lambda config: _rotary_share(config) == 1,
    "it rotates only a part of each head (partial_rotary_factor), which the format cannot say",
)
PLAIN_ROPE = Condition(
    lambda config: _rope_type(config) == "default",
    "it scales its rotary positions (rope_type), which the format cannot say",
)
SILU = equal("hidden_act", "silu", "it computes silu there")
CAUSAL = equal("use_bidirectional_attention", None, "the format has causal attention only")

# What engines do with settings that a format can say: notes.
MLX_SCALES = Condition(PLAIN_ROPE.holds, "mlx-lm ignores rope scaling in this format")
LLAMA_CPP_SCALES = Condition(
    lambda config: _rope_type(config) not in {"llama3", "longrope"},
    "llama.cpp ignores the rope scaling of Llama 3 and of long-context Phi in this format",
)
CONVERTER_SCALES = Condition(
    lambda config: _rope_type(config) != "longrope",
    "llama.cpp's converter leaves out the rope scaling of long-context Phi: write a .gguf file instead",
)
ROTARY_KERNEL = "vLLM turns its queries and keys otherwise on CPUs; on GPUs it was not run"
NO_WINDOW = Condition(
    lambda config: not config.get("sliding_window") or not slides(config),
    "llama.cpp and mlx-lm ignore sliding windows in this format",
)
