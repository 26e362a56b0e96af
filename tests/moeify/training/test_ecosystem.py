"""The trainers that people use, as they use them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import moeify
from moeify.config import MoEConfig
from moeify.layers import SparseMoE
from moeify.training.run_log import read_run
from tests.moeify import tiny

tf: Any = transformers
CONFIGS = {
    "deepseek_v3": MoEConfig.deepseek_v3(6, 2, router={"n_group": 3, "topk_group": 2}, attach_losses=True),
    "switch": MoEConfig.switch(5, attach_losses=True),
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other libraries about each other
        yield


class Texts(torch.utils.data.Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.randint(3, tiny.VOCABULARY, (11,), generator=torch.Generator().manual_seed(index))
        mask = torch.ones_like(ids)
        mask[11 - index % 3 :] = 0
        return {"input_ids": ids, "attention_mask": mask, "labels": ids}


def trainer(model: Any, folder: Path, **options: Any) -> Any:
    arguments = tf.TrainingArguments(
        output_dir=str(folder), **{"per_device_train_batch_size": 4, "max_steps": 4, "logging_steps": 1, "seed": 7,
        "save_steps": 2, "learning_rate": 1e-2, "use_cpu": True, "report_to": "none", "disable_tqdm": True, **options},
    )  # fmt: skip
    made = tf.Trainer(model=model, args=arguments, train_dataset=Texts())
    made.add_callback(moeify.RoutingCallback(made))
    return made


@pytest.mark.parametrize("name", CONFIGS)
def test_training_goes_on_identically_from_a_checkpoint(name: str, tmp_path: Path) -> None:
    whole = trainer(moeify.convert(tiny.build("llama"), CONFIGS[name]), tmp_path)
    whole.train()
    resumed = trainer(moeify.convert(tiny.build("llama", seed=5), CONFIGS[name]), tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected = whole.model.state_dict()
    for key, value in resumed.model.state_dict().items():
        assert value.equal(expected[key]), key
    if name == "deepseek_v3":
        assert expected["model.layers.0.mlp.router.selection_bias"].any()
    loaded: Any = moeify.load(tmp_path / "checkpoint-4")
    assert all(value.equal(expected[key]) for key, value in loaded.state_dict().items())


def test_what_is_logged(tmp_path: Path) -> None:
    config = MoEConfig(5, 2, z_loss=1e-3, capacity_factor=1.0, attach_losses=True)
    model = moeify.convert(tiny.build("llama"), config)
    run = trainer(model, tmp_path, save_strategy="no", report_to="tensorboard", max_steps=3,
                  gradient_accumulation_steps=2)  # fmt: skip
    run.train()
    logged = [entry for entry in run.state.log_history if "moe_entropy" in entry]
    assert [entry["step"] for entry in logged] == [1, 2, 3]
    assert {"moe_load_max", "moe_load_min", "moe_dropped", "moe_idle", "moe_balance", "moe_z"} <= logged[0].keys()
    assert 0.2 < logged[0]["moe_load_max"] < 1 and 0 < logged[0]["moe_dropped"] < 1
    assert {layer.loss_scale for layer in model.modules() if isinstance(layer, SparseMoE)} == {0.5}
    events = next(tmp_path.rglob("events.out.tfevents*"))
    reading: Any = import_module("tensorboard.backend.event_processing.event_accumulator")
    accumulator = reading.EventAccumulator(str(events))
    accumulator.Reload()
    assert len(accumulator.Scalars("train/moe_entropy")) == 3
    path = "model.layers.1.mlp"
    assert [event.step for event in accumulator.Scalars(f"moe_load_max/{path}")] == [1, 2, 3]
    assert accumulator.Histograms(f"moe_loads/{path}")[-1].step == 3  # it keeps the last one
    assert [event.step for event in accumulator.Images("moe_loads")] == [1]
    windows = read_run(tmp_path / "routing.jsonl").windows
    assert [window.step for window in windows] == [1, 2, 3]
    busiest = sum(max(layer.load) for layer in windows[0].layers.values()) / 3 / 5
    assert busiest == pytest.approx(logged[0]["moe_load_max"], rel=1e-3)


def test_attached_losses_balance_an_untouched_script(tmp_path: Path) -> None:
    def busiest(aux_loss: float) -> float:
        model: Any = moeify.convert(tiny.build("llama"), MoEConfig(5, 1, aux_loss=aux_loss, attach_losses=True))
        run = trainer(model, tmp_path, save_strategy="no", max_steps=12)
        run.train()
        share: float = run.state.log_history[-2]["moe_load_max"]
        return share

    assert busiest(1.0) < busiest(0.0)


def test_sft_trainer(tmp_path: Path) -> None:
    datasets: Any = import_module("datasets")
    trl: Any = import_module("trl")
    tokenizer = tiny.tokenizer("<pad>", "<bos>", "<eos>", pad_token="<pad>", eos_token="<eos>")
    texts = [{"text": " ".join(f"w{(i * j) % 90}" for j in range(5 + i % 4))} for i in range(12)]
    model: Any = moeify.convert(tiny.build("llama"), CONFIGS["deepseek_v3"])
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, logging_steps=1, use_cpu=True, bf16=False,
        report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    run: Any = trl.SFTTrainer(model, arguments, train_dataset=datasets.Dataset.from_list(texts),
                              processing_class=tokenizer)  # fmt: skip
    run.add_callback(moeify.RoutingCallback(run))
    run.train()
    logged = [entry for entry in run.state.log_history if "moe_entropy" in entry]
    assert len(logged) == 2
    assert model.model.layers[0].mlp.router.selection_bias.any()


def test_lora_on_the_experts_and_on_everything_else() -> None:
    import peft

    model: Any = moeify.convert(tiny.build("llama"), replace(CONFIGS["deepseek_v3"], z_loss=0.1))
    lora = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip
    before = tiny.logits(model, "llama")
    wrapped: Any = peft.get_peft_model(model, lora).train()
    ids = torch.arange(60).reshape(4, 15) % tiny.VOCABULARY
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    moeify.attach_bias_update(wrapped, optimizer)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    for _ in range(2):
        optimizer.zero_grad()
        wrapped(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        optimizer.step()
    trained = {name for name, p in wrapped.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("experts" in name for name in trained) and any("q_proj" in name for name in trained)
    assert all("lora_" in name for name in trained)
    assert next(iter(moeify.routing_stats(wrapped).values())).tokens == int(mask.sum())
    merged: Any = wrapped.merge_and_unload().eval()
    assert tiny.relative(tiny.logits(merged, "llama"), before) > 1e-4
    assert any(isinstance(layer, SparseMoE) for layer in merged.modules())


@pytest.mark.parametrize("way", [{"target_parameters": ["mlp.router.weight"]}, {"modules_to_save": ["router"]}])
def test_routers_inside_wrappers_of_peft(way: dict[str, Any]) -> None:
    import peft

    config = replace(CONFIGS["deepseek_v3"], capacity_factor=1.0)
    model: Any = moeify.convert(tiny.build("llama"), config)
    lora: Any = peft.LoraConfig(r=2, **{"target_modules": ["q_proj"], **way})
    wrapped: Any = peft.get_peft_model(model, lora).train()
    ids = torch.arange(60).reshape(4, 15) % tiny.VOCABULARY
    wrapped(input_ids=ids, labels=ids).loss.backward()
    assert any("router" in name and p.grad is not None for name, p in wrapped.named_parameters())
    moeify.update_selection_bias(wrapped)
    buffers = [b for name, b in wrapped.named_buffers() if name.endswith("selection_bias")]
    assert buffers and all(bias.any() for bias in buffers)
    assert moeify.routing_stats(wrapped)


def test_the_optimizer_that_accelerate_wrapped_moves_the_bias() -> None:
    accelerate: Any = import_module("accelerate")
    model: Any = tiny.build("llama")
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    moeify.convert(model, replace(CONFIGS["deepseek_v3"], shared_experts=1), optimizer=optimizer)
    moeify.attach_bias_update(model.train(), optimizer)
    ids = torch.arange(60).reshape(4, 15) % tiny.VOCABULARY
    accelerator.backward(model(input_ids=ids, labels=ids).loss)
    optimizer.step()
    layers = [layer for layer in model.modules() if isinstance(layer, SparseMoE)]
    assert all(layer.get_buffer("router.selection_bias").any() for layer in layers)
    assert model.model.layers[0].mlp.shared_expert.down_proj.grad.any()
