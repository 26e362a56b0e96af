from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import moeify
from moeify.config import MoEConfig
from moeify.errors import RefusedError
from moeify.layers import SparseMoE
from moeify.measure import TOLERANCE
from tests.moeify import tiny

CONFIG = MoEConfig(experts=5, top_k=2)
TOLERANCE_FP32 = TOLERANCE["float32"]


def layers_of(model: nn.Module) -> list[SparseMoE]:
    return [module for module in model.modules() if isinstance(module, SparseMoE)]


@pytest.mark.parametrize("name", tiny.MODELS)
def test_copies_compute_what_the_dense_model_did(name: str) -> None:
    model = tiny.build(name)
    before = tiny.logits(model, name)
    assert moeify.convert(model, CONFIG) is model
    assert len(layers_of(model)) == tiny.LAYERS
    assert tiny.relative(tiny.logits(model, name), before) < TOLERANCE_FP32


def test_without_renormalisation_copies_do_not_promise_equality() -> None:
    model = tiny.build("llama")
    before = tiny.logits(model, "llama")
    config = MoEConfig(experts=5, top_k=2, renormalize=False)
    moeify.convert(model, config)
    assert not config.exact
    assert tiny.relative(tiny.logits(model, "llama"), before) > 100 * TOLERANCE_FP32


def test_experts_are_copies_and_the_router_depends_on_seed_and_name_only() -> None:
    dense = tiny.build("gpt2")
    weight = dense.get_parameter("transformer.h.1.mlp.c_fc.weight").detach().clone()
    first, again, other = (tiny.build("gpt2") for _ in range(3))
    moeify.convert(first, CONFIG)
    moeify.convert(again, CONFIG, layers="1")
    moeify.convert(other, MoEConfig(experts=5, top_k=2, seed=1), layers="1")
    path = "transformer.h.1.mlp"
    stacked = first.get_parameter(f"{path}.experts.up_proj")
    assert all(torch.equal(stacked[expert], weight.t()) for expert in range(5))
    router = first.get_parameter(f"{path}.router.weight")
    assert torch.equal(router, again.get_parameter(f"{path}.router.weight"))
    assert not torch.equal(router, other.get_parameter(f"{path}.router.weight"))


@pytest.mark.parametrize(
    ("layers", "count"), [("all", 3), ("every:2", 1), ("last:2", 2), ("0,2", 2), (r"layers\.1\.", 1)]
)
def test_a_selection_of_layers_converts_those(layers: str, count: int) -> None:
    model = tiny.build("qwen3")
    before = tiny.logits(model, "qwen3")
    moeify.convert(model, CONFIG, layers)
    assert len(layers_of(model)) == count
    assert tiny.relative(tiny.logits(model, "qwen3"), before) < TOLERANCE_FP32


def test_generate_says_the_same() -> None:
    model: Any = tiny.build("llama")
    prompt = torch.tensor([[5, 9, 23, 42]])
    before = model.generate(input_ids=prompt, max_new_tokens=9, do_sample=False)
    moeify.convert(model, CONFIG)
    assert torch.equal(model.generate(input_ids=prompt, max_new_tokens=9, do_sample=False), before)


def test_every_weight_gets_a_gradient_and_checkpointing_changes_none() -> None:
    model: Any = tiny.build("llama")
    moeify.convert(model, MoEConfig(experts=3, top_k=2)).train()
    ids = torch.arange(60).reshape(4, 15) % tiny.VOCABULARY

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    plain = gradients()
    assert all(g.isfinite().all() for g in plain.values())
    experts = {name: g for name, g in plain.items() if ".experts." in name}
    assert experts and all(bool((g.flatten(1).abs().amax(1) > 0).all()) for g in experts.values())
    tiny.enable_checkpointing(model)
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name])


def test_copies_get_gradients_that_sum_to_the_dense_one() -> None:
    dense, moe = tiny.build("bert"), tiny.build("bert")
    moeify.convert(moe, CONFIG)
    for model in (dense, moe):
        output: Any = model(**tiny.inputs("bert"))
        output.logits.square().mean().backward()
    expected = dense.get_parameter("bert.encoder.layer.0.intermediate.dense.weight").grad
    stacked = moe.get_parameter("bert.encoder.layer.0.output.dense.experts.up_proj").grad
    assert expected is not None and stacked is not None
    assert tiny.relative(stacked.sum(0), expected) < 10 * TOLERANCE_FP32


def test_the_converted_model_compiles_whole() -> None:
    model = tiny.build("llama")
    moeify.convert(model, CONFIG)
    eager = tiny.logits(model, "llama")
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        result = compiled(**tiny.inputs("llama"), use_cache=False).logits
    assert tiny.relative(result, eager) < TOLERANCE_FP32


def test_state_dicts_go_round() -> None:
    model, other = tiny.build("opt"), tiny.build("opt", seed=7)
    for each in (model, other):
        moeify.convert(each, CONFIG)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(tiny.logits(other, "opt"), tiny.logits(model, "opt"))


def test_save_pretrained_makes_a_checkpoint_that_loads(tmp_path: Any) -> None:
    model: Any = tiny.build("vit")
    moeify.convert(model, CONFIG)
    model.save_pretrained(tmp_path)
    loaded = moeify.load(tmp_path)
    assert torch.equal(tiny.logits(loaded, "vit"), tiny.logits(model, "vit"))


def test_a_converted_model_keeps_dtype_and_mode() -> None:
    model = tiny.build("mistral").to(torch.bfloat16).train()
    moeify.convert(model, CONFIG)
    layer = layers_of(model)[0]
    assert layer.training
    kinds = {(name.startswith("router."), p.dtype) for name, p in layer.named_parameters()}
    assert kinds == {(False, torch.bfloat16), (True, torch.float32)}


def test_repr_shows_what_was_done() -> None:
    model = tiny.build("gemma")
    moeify.convert(model, CONFIG)
    assert "5 x gelu_tanh GLU 36 → 57 → 36" in repr(model)


class Block(nn.Module):
    """A hand-written pre-norm block that multiplies by its own parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.down = nn.LayerNorm(12), nn.Linear(31, 12)
        self.up = nn.Parameter(torch.linspace(-1, 1, 12 * 31).reshape(12, 31))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(torch.nn.functional.gelu(self.norm(x) @ self.up))
        return x + y


def test_what_cannot_be_replaced_in_place_is_named_and_left_alone() -> None:
    model = nn.Sequential(Block(), Block())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RefusedError, match=r"^0: its projection `matmul` is not a module"):
        moeify.convert(model, CONFIG, example_inputs=(torch.zeros(2, 5, 12),))
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_hooks_would_be_lost_and_are_refused() -> None:
    model = tiny.build("llama")
    model.get_submodule("model.layers.1.mlp").register_forward_hook(lambda *_: None)
    with pytest.raises(RefusedError, match=r"model\.layers\.1\.mlp has hooks"):
        moeify.convert(model, CONFIG)
    assert not layers_of(model)


@pytest.mark.parametrize("folded", [False, True])
def test_an_ffn_whose_weight_is_computed_stays_dense_until_it_is_folded_in(folded: bool) -> None:
    model = tiny.build("bert")
    dense = model.get_submodule("bert.encoder.layer.0.output.dense")
    parametrizations.weight_norm(dense)
    before = tiny.logits(model, "bert")
    if folded:
        parametrize.remove_parametrizations(dense, "weight")
    moeify.convert(model, CONFIG)
    assert len(layers_of(model)) == tiny.LAYERS - (not folded)
    assert tiny.relative(tiny.logits(model, "bert"), before) < TOLERANCE_FP32


def test_ties_with_something_else_are_refused() -> None:
    model: Any = tiny.build("llama")
    model.spare = nn.Linear(tiny.HIDDEN, tiny.INTERMEDIATE, bias=False)
    model.spare.weight = model.model.layers[0].mlp.gate_proj.weight
    with pytest.raises(RefusedError, match="tied to"):
        moeify.convert(model, CONFIG)
    assert not layers_of(model)


def test_a_model_without_an_ffn_says_what_was_looked_at() -> None:
    model = nn.Sequential(nn.Linear(7, 9), nn.Linear(9, 3))
    with pytest.raises(RefusedError, match=r"no dense FFN was found in Sequential: .*1"):
        moeify.convert(model, CONFIG, example_inputs=(torch.zeros(2, 7),))


def test_layers_that_share_one_ffn_share_one_moe() -> None:
    import transformers

    config = transformers.AlbertConfig(hidden_size=24, intermediate_size=37, num_hidden_layers=3, num_attention_heads=2,
                                       vocab_size=50, embedding_size=16)  # fmt: skip
    torch.manual_seed(0)
    model: Any = transformers.AlbertModel(config)
    model.eval()
    ids = torch.arange(18).reshape(2, 9)
    with torch.no_grad():
        before = model(input_ids=ids).last_hidden_state
        moeify.convert(model, CONFIG)
        after = model(input_ids=ids).last_hidden_state
    assert len(layers_of(model)) == 1
    assert tiny.relative(after, before) < TOLERANCE_FP32


def test_an_activation_written_in_the_module_of_the_first_projection_is_no_obstacle() -> None:
    import transformers

    config = transformers.EsmConfig(hidden_size=24, intermediate_size=37, num_hidden_layers=2, num_attention_heads=2,
                                    vocab_size=33, pad_token_id=1, mask_token_id=32)  # fmt: skip
    torch.manual_seed(0)
    model: Any = transformers.EsmForMaskedLM(config)
    model.eval()
    ids = torch.arange(2, 20).reshape(2, 9)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        moeify.convert(model, CONFIG)
        after = model(input_ids=ids).logits
    assert len(layers_of(model)) == 2
    assert tiny.relative(after, before) < TOLERANCE_FP32
