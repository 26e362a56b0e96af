from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import moeify
from moeify.config import MoEConfig
from moeify.errors import CheckpointError, ConfigError, RefusedError
from moeify.report.collect import collect
from moeify.report.data import Report
from tests.moeify import native, tiny
from tests.moeify.report import small

TEXT = " ".join(f"w{(7 * n * n) % 90}" for n in range(600))  # two windows, the second one short
EXPERTS = "model.layers.1.block_sparse_moe.experts"


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model, one expert of which has moved since."""
    folder = tmp_path_factory.mktemp("collect")
    tiny.convert_files(small.save_dense(folder / "dense"), folder / "moe", MoEConfig(4, 2))
    file = folder / "moe" / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{EXPERTS}.2.w2.weight"] *= 1.5
    save_file(tensors, file, {"format": "pt"})
    return folder / "moe"


@pytest.fixture(scope="module")
def report(moe: Path) -> Report:
    return collect(str(moe), str(moe.parent / "dense"), text=TEXT, text_name="words.txt")


@torch.no_grad()
def test_routing_is_that_of_the_text(moe: Path, report: Report) -> None:
    model: Any = moeify.load(moe, experts_implementation="eager")
    ids = torch.tensor([[3 + (7 * n * n) % 90 for n in range(600)]])
    windows = [ids[:, :512], ids[:, 512:]]
    outputs = [model(input_ids=window, output_router_logits=True) for window in windows]
    nll = [F.cross_entropy(o.logits[0, :-1], w[0, 1:], reduction="sum") for o, w in zip(outputs, windows, strict=True)]
    assert report.text and report.text.tokens == 600 and report.text.source == "words.txt"
    assert report.text.perplexity == pytest.approx(math.exp(float(sum(nll)) / 598), rel=1e-3)
    logits = torch.cat([output.router_logits[2] for output in outputs])
    chosen = logits.topk(2).indices
    layer = report.routing[2]
    load = torch.bincount(chosen.flatten(), minlength=4) / 1200 * 4
    assert layer.load == pytest.approx(load.tolist(), rel=1e-3) and layer.choices == 1200 and layer.top_k == 2
    both = sum(1 for row in chosen.tolist() if {0, 1} <= set(row))
    first = sum(1 for row in chosen.tolist() if 0 in row)
    assert layer.together[0][1] == pytest.approx(both / first, rel=1e-3)
    assert layer.logit_size == pytest.approx(float(logits.square().mean().sqrt()), rel=1e-3)
    assert layer.logit_max == pytest.approx(float(logits.abs().max()), rel=1e-3)
    scores = logits.softmax(-1)
    entropy = -(scores * scores.log()).sum(-1).mean() / math.log(4)
    assert layer.entropy == pytest.approx(float(entropy), rel=1e-3)
    passage = report.text.layers[2]
    assert passage.experts[5] == tuple(chosen[5].tolist()) and sum(passage.weights[5]) == pytest.approx(1, abs=2e-3)
    assert len(passage.experts) == len(report.text.passage) == 120 and report.text.passage[1] == "w7"


def test_the_dense_model_is_beside_it(moe: Path, report: Report) -> None:
    recorded = [proof.when for proof in report.proofs]
    assert recorded == ["now"]  # it was converted without a proof
    proof = report.proofs[0]
    assert not proof.passed and proof.altered == 1
    assert [layer.relative < 1e-12 for layer in proof.layers] == [True, False, True]
    tensors = load_file(moe / "model.safetensors")
    moved, w2 = tensors[f"{EXPERTS}.2.w2.weight"], tensors[f"{EXPERTS}.1.w2.weight"]
    others = sum(tensors[f"{EXPERTS}.1.{name}.weight"].square().sum() for name in ("w1", "w3"))
    distance = ((moved - w2).square().sum() / (w2.square().sum() + others)).sqrt()
    assert report.weights[1].distance == pytest.approx((0.0, 0.0, float(distance), 0.0), rel=1e-3)
    flat = [torch.cat([tensors[f"{EXPERTS}.{n}.{w}.weight"].flatten() for w in ("w1", "w2", "w3")]) for n in (1, 2)]
    cosine = float(F.cosine_similarity(flat[0], flat[1], dim=0))
    assert report.weights[1].farthest == pytest.approx((0, 2, cosine), rel=1e-3)
    assert report.weights[0].mean == 1 and report.weights[0].distance == (0.0,) * 4
    assert report.text and report.text.dense_perplexity != report.text.perplexity


def test_how_it_was_made_and_what_it_costs(moe: Path, report: Report) -> None:
    assert report.conversion and (report.conversion.source, report.conversion.target) == ("llama", "mixtral")
    assert report.conversion.settings == {"experts": "4", "top_k": "2", "method": "copy", "router": "softmax"}
    assert "llama.cpp" in report.engines
    assert report.costs and report.costs.dense
    model: Any = moeify.load(moe)
    assert report.costs.moe.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert report.costs.memory["bfloat16"] == 2 * report.costs.moe.parameters
    assert report.costs.dense.active < report.costs.moe.active < report.costs.moe.parameters
    assert [row.ranks for row in report.costs.parallel] == [2, 4]  # as 4 experts can be shared
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["layers"][0]["router"] == "MixtralTopKRouter"
    assert any(finding.startswith("It differs from the dense model") for finding in report.findings)


def test_a_downloaded_moe_without_a_tokenizer_shows_ids(tmp_path: Path) -> None:
    native.build("qwen2_moe").save_pretrained(tmp_path / "moe")
    made = collect(str(tmp_path / "moe"), text="unread")
    assert made.text and made.text.source == "random token ids" and made.text.perplexity is None
    assert all(token.isdigit() for token in made.text.passage) and len(made.routing) == 3
    assert made.notes == ("there is no tokenizer beside the model, so it ran on random token ids",)
    assert made.conversion is None and made.proofs == () and made.weights[0].mean < 0.5


def test_where_tokens_choose_nothing_the_rest_is_told(tmp_path: Path) -> None:
    tiny.convert_files(
        small.save_dense(tmp_path / "dense", "vit", tokenizer=False), tmp_path / "moe", MoEConfig(4, 2, router="soft")
    )
    made = collect(str(tmp_path / "moe"))
    assert made.routing == () and len(made.weights) == 3 and made.conversion and made.conversion.target == "moeify"
    assert made.notes == ("its tokens choose no experts (soft routing), so no routing is shown",)
    with pytest.raises(ConfigError, match="--text is for models of text"):
        collect(str(tmp_path / "moe"), text="w1")


def test_what_cannot_be_reported_on_is_one_line(moe: Path) -> None:
    with pytest.raises(RefusedError, match="dense has no MoE layer to report on: convert it first"):
        collect(str(moe.parent / "dense"))
    with pytest.raises(ConfigError, match=r"words\.txt gives no tokens"):
        collect(str(moe), text=" \n", text_name="words.txt")


@pytest.mark.parametrize("change", [{"passed": None}, {"layers": [{}]}, {"layers": 3}, {"layers": [{"dtype": []}]}])
def test_a_damaged_record_of_a_proof_is_one_line(tmp_path: Path, moe: Path, change: dict[str, object]) -> None:
    copied = tmp_path / "moe"
    copied.mkdir()
    for file in moe.iterdir():
        (copied / file.name).symlink_to(file)
    record = json.loads((moe / "moeify.json").read_text())
    (copied / "moeify.json").unlink()
    whole: dict[str, object] = {
        "passed": True,
        "relative": 0.0,
        "tolerance": None,
        "top1_agreement": 1.0,
        "altered": [],
        "layers": [],
    }
    damaged = {name: value for name, value in {**whole, **change}.items() if value is not None}
    (copied / "moeify.json").write_text(json.dumps({**record, "verification": damaged}))
    with pytest.raises(CheckpointError, match="its verification cannot be used"):
        collect(str(copied))
