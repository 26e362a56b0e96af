"""A folder that engines load: the graph, and what stands beside it for onnxruntime-genai and optimum.

onnxruntime-genai reads `genai_config.json` (https://onnxruntime.ai/docs/genai/reference/config), optimum's
`ORTModelForCausalLM` reads `config.json`; both read the files of a tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from moeify.contract.found import text_config
from moeify.errors import CheckpointError
from moeify.export.capture.interface import PRESENT, STATE
from moeify.export.pipeline import export
from moeify.files.staging import staged_folder
from moeify.pretrained import save_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from moeify.export.onnx_file import Request
    from moeify.export.report import OnnxReport

GENAI = "genai_config.json"
_ENDS = "eos_token_id"
_KIND = "llama"  # how genai calls a decoder with these inputs; it knows no Mixtral, and asks the graph for the rest


def export_folder(
    model: Any, request: Request, tokenizer: PreTrainedTokenizerBase | None, entries: Mapping[str, str]
) -> OnnxReport:
    """Export a model of transformers into the folder of the request's file; it stays as it is.

    Args:
        model: Of the request's dtype, with its config.
        request: What is asked for, checked.
        tokenizer: To be written beside the graph, if there is one.
        entries: More entries for the file's metadata.

    Raises:
        MoeifyError: see `moeify.export_onnx`.
    """
    with staged_folder(request.path.parent, overwrite=request.overwrite, resume=False) as folder:
        file = folder / request.path.name
        report = export(model, replace(request, path=file), None, entries)
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        if tokenizer is not None:
            save_tokenizer(tokenizer, folder)
        genai = genai_config(file, model, tokenizer)
        if genai is not None:
            (folder / GENAI).write_text(json.dumps(genai, indent=2) + "\n", "utf-8")
    return replace(report, path=str(request.path))


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Return the tokens that end a text: of the generation config, else of the model's config, else of the tokenizer.

    Raises:
        CheckpointError: They are no numbers.
    """
    held = (getattr(model, "generation_config", None), text_config(model), tokenizer)
    found: Any = next((ends for ends in (getattr(each, _ENDS, None) for each in held) if ends is not None), [])
    ends = found if isinstance(found, list) else [found]
    if not all(isinstance(number, int) for number in ends):
        raise CheckpointError(f"{_ENDS} is {found!r}: expected the number of a token, or a list of them")
    return ends


def genai_config(file: Path, model: Any, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, object] | None:
    """Return what onnxruntime-genai has to know of a decoder; None for a graph that it cannot run."""
    graph = onnx.load(file, load_external_data=False).graph
    shapes = {value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim] for value in graph.input}
    states = [shape for name, shape in shapes.items() if name.startswith(STATE)]
    outputs = {value.name for value in graph.output}
    plain = {name for name in shapes if not name.startswith(STATE)}
    if not states or "logits" not in outputs or plain != {"input_ids", "attention_mask", "position_ids"}:
        return None
    if len({tuple(shape) for shape in states}) > 1:
        return None  # layers with other heads, or other caches
    config, generation = model.config.get_text_config(), model.generation_config
    _, heads, _, size = states[0]
    ids: dict[str, object] = {name: getattr(generation, name, None) for name in ("bos_token_id", "pad_token_id")}
    ends = end_tokens(model, tokenizer)
    ids[_ENDS] = ends if len(ends) > 1 else next(iter(ends), None)
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": file.name,
        "head_size": size,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": len(states) // 2,
        "num_key_value_heads": heads,
        "inputs": {
            **{name: name for name in sorted(plain)},
            "past_key_names": f"{STATE}%d.key",
            "past_value_names": f"{STATE}%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": f"{PRESENT}%d.key",
            "present_value_names": f"{PRESENT}%d.value",
        },
    }
    length = config.max_position_embeddings
    return {
        "model": {"type": _KIND, "vocab_size": config.vocab_size, "context_length": length, **ids, "decoder": decoder},
        "search": {"do_sample": False, "max_length": length, "past_present_share_buffer": False},
    }
