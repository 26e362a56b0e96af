"""Every code block of the pages runs, or says why not."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import moeify
from tests.docs.code_blocks import NOT_RUN, PAGES, ROOT, Block, blocks, run_page

LANGUAGES = {"", "python", "sh", "text", "yaml"}  # without a language: diagrams, and what another program prints
DENSE = ("my-dense-model", "my-dense", "SRC", "DENSE")  # what the pages call a dense model
MOE = ("my-moe", "MOE", "FOLDER")  # and a converted one
RUN = [page for page in PAGES if any(block.language in {"python", "sh"} and not block.why for block in blocks(page))]


@pytest.fixture(scope="module")
def models_of_the_pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama under all its names, what it becomes, and a text."""
    folder, tf = tmp_path_factory.mktemp("pages"), cast_any(transformers)
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words = Tokenizer(models.BPE({**letters, "<pad>": 256, "<s>": 257, "</s>": 258}, []))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    config = tf.LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                            num_key_value_heads=2, vocab_size=260, pad_token_id=256, bos_token_id=257, eos_token_id=258)
    model = tf.LlamaForCausalLM(config)
    for names, made in ((DENSE, lambda: model), (MOE, lambda: moeify.convert(model, moeify.MoEConfig(8, 2)))):
        made().save_pretrained(folder / names[0])
        tokenizer.save_pretrained(folder / names[0])
        for name in names[1:]:
            shutil.copytree(folder / names[0], folder / name)
    (folder / "book.txt").write_text("Once upon a time there were eight experts. " * 20)
    return folder


def cast_any(module: object) -> Any:
    return module


@pytest.mark.filterwarnings("ignore")  # of other libraries about each other
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_blocks_of_a_page_run(
    page: Path, models_of_the_pages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(models_of_the_pages, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    run_page(page, monkeypatch)
