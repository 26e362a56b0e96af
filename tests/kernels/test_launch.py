"""The host side of the Triton kernels, run for real up to the launch.

Nothing is launched (`no_driver`). Needs a process in which kernels are compiled: TRITON_INTERPRET unset.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.runtime.jit import JITFunction

from moeify.kernels.gpu import blocksparse, tuned_tiles
from moeify.kernels.gpu import experts as gpu_experts
from moeify.kernels.gpu import layout as gpu_layout
from moeify.kernels.gpu.blocksparse import dds, dsd, sdd
from moeify.kernels.gpu.quantized import quantized_experts
from moeify.kernels.gpu.target import multiprocessors
from moeify.kernels.gpu.tiles import Tile
from moeify.kernels.inputs import ExpertInputs, Kept
from moeify.kernels.layout import max_tiles, sort_by_expert
from moeify.kernels.tools import static_analysis
from moeify.kernels.topology import block_topology
from tests.kernels import oracle
from tests.kernels.no_driver import no_driver
from tests.kernels.quantizing import to_e4m3, to_int4

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="needs kernels that are compiled")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int, Any]]]:
    with no_driver(monkeypatch) as seen:
        yield seen


def test_forward_and_backward_launch_what_they_should(launches: list[tuple[str, int, Any]]) -> None:
    inputs = oracle.make_inputs(1024, 2, 128, 64, 4, gated=True, bias=True, dtype=torch.bfloat16)
    arguments = ExpertInputs(*(*inputs.values(), "silu", True))
    _, (z, _, _) = gpu_experts.experts_forward(arguments, keep=True)
    forward = [name for name, _, _ in launches]
    assert forward == [
        "count_kernel",
        "place_kernel",
        "tile_map_kernel",
        "up_kernel",
        "rows_kernel",
        "combine_kernel",
    ]
    order, offsets = sort_by_expert(inputs["ids"], 4)  # nothing ran: the kernels' own are not numbers
    grads = gpu_experts.experts_backward(inputs["x"], arguments, Kept(z, order, offsets), [True] * 7)
    backward = [name for name, _, _ in launches][len(forward) :]
    assert backward.count("tile_map_kernel") == 1
    assert backward.count("weights_kernel") == backward.count("gather_kernel") == backward.count("bias_kernel") == 2
    assert (
        backward.count("down_backward_kernel") == backward.count("rows_kernel") == backward.count("combine_kernel") == 1
    )
    for name, t in inputs.items():
        index = list(inputs).index(name)
        assert name == "ids" or grads[index].shape == t.shape
    for name, programs, compiled in launches:
        found = static_analysis.resources(compiled, "sm_90")
        assert programs > 0 and found.fits and found.spill == 0, name
        if name in {"up_kernel", "rows_kernel", "down_backward_kernel", "weights_kernel"}:
            assert found.tensor_ops, name
            assert found.async_copies.keys() & {"LDGSTS", "UTMALDG"}, name  # arguments were seen to be aligned


def test_programs_that_take_tiles_by_turns_are_as_many_as_multiprocessors(launches: list[tuple[str, int, Any]]) -> None:
    offsets, a, w = torch.tensor([0, 700, 900], dtype=torch.int32), torch.zeros(900, 128), torch.zeros(2, 512, 128)
    with tuned_tiles.on_trial(Tile(128, 128, 64, 8, 3, tma=True, persistent=True)):
        for first in (0, 1):  # the second is not aligned, and is read by pointer
            p, weight = a.bfloat16()[:, first:], w.bfloat16()[..., first:]
            gpu_experts.launch_rows(p, weight.transpose(1, 2), None, offsets, gpu_experts.cut(offsets, 900))
    (_, few, by_turns), (_, many, _) = (launch for launch in launches if launch[0] == "rows_kernel")
    assert (few, many) == (multiprocessors(a.device), max_tiles(900, 2, 128) * 4)
    assert "UTMALDG" in static_analysis.resources(by_turns, "sm_90").async_copies


def test_another_number_of_tokens_compiles_nothing_again(launches: list[tuple[str, int, Any]]) -> None:
    compiled = []
    for tokens in (1024, 1025, 1153):
        inputs = oracle.make_inputs(tokens, 2, 128, 64, 4, gated=True, bias=True, dtype=torch.bfloat16)
        arguments = ExpertInputs(*(*inputs.values(), "silu", True))
        _, (z, _, _) = gpu_experts.experts_forward(arguments, keep=True)
        order, offsets = sort_by_expert(inputs["ids"], 4)
        gpu_experts.experts_backward(inputs["x"], arguments, Kept(z, order, offsets), [True] * 7)
        compiled.append({(name, id(code)) for name, _, code in launches})
    assert compiled[0] == compiled[2], compiled[2] - compiled[0]


def test_a_decoded_token_takes_four_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **options: names.append(self.__name__))
    monkeypatch.setattr(tuned_tiles, "architecture", lambda: "sm_90")
    inputs = oracle.make_inputs(1, 2, 128, 64, 4, gated=True, bias=True, dtype=torch.bfloat16)
    gpu_experts.experts_forward(ExpertInputs(*(*inputs.values(), "silu", True)), keep=False)
    assert names == ["route_kernel", "up_kernel", "rows_kernel", "combine_kernel"]


def test_block_sparse_products_launch(launches: list[tuple[str, int, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocksparse, "interpreted", lambda: True)  # tensors on CPU are let through
    topology = block_topology(torch.tensor([0, 60, 100], dtype=torch.int32), 100, 64, 64)
    data = sdd(torch.zeros(100, 64), torch.zeros(64, 128), topology)
    dsd(data, torch.zeros(128, 64), topology)
    dds(torch.zeros(64, 100), data, topology)
    names = [name for name, _, _ in launches]
    assert names == ["sdd_kernel", "dsd_kernel", "dsd_transposed_kernel"]


@pytest.mark.parametrize(("kind", "product"), [("e4m3", "QGMMA"), ("int4", "HGMMA")])
def test_quantized_experts_launch(kind: str, product: str, launches: list[tuple[str, int, Any]]) -> None:
    made = oracle.make_inputs(256, 2, 128, 64, 4, gated=True, bias=False, dtype=torch.bfloat16)
    both = made["up"], made["down"]
    up, down = (to_int4(w, 64) if kind == "int4" else to_e4m3(w, (w.shape[1], w.shape[2])) for w in both)
    inputs = ExpertInputs(*(*(made | {"up": up.values, "down": down.values}).values(), "silu", True))
    assert quantized_experts(inputs, up.scales, down.scales).dtype == torch.bfloat16
    names = [name for name, _, _ in launches]
    middle = ["quantized_rows_kernel", "activate_kernel", "quantized_rows_kernel"]
    assert names[-4 - (kind == "e4m3") :] == [*["activate_kernel"] * (kind == "e4m3"), *middle, "combine_kernel"]
    for name, _, compiled in launches:
        if name == "quantized_rows_kernel":
            found = static_analysis.resources(compiled, "sm_90")
            assert product in found.tensor_ops and found.spill == 0 and "LDGSTS" in found.async_copies


def test_no_launch_depends_on_the_routing(launches: list[tuple[str, int, Any]]) -> None:
    for ids in (torch.zeros(64, 2, dtype=torch.int64), torch.randint(0, 4, (64, 2))):
        layout = gpu_layout.routing_layout(ids, 4)
        gpu_layout.tile_map(layout.offsets_E1, 128, 64)
    half = len(launches) // 2
    assert [launch[:2] for launch in launches[:half]] == [launch[:2] for launch in launches[half:]]


def test_a_file_of_tiles_changes_what_is_launched(
    launches: list[tuple[str, int, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def launch_rows() -> None:
        tuned_tiles._read.cache_clear()
        offsets = torch.tensor([0, 7, 7, 20], dtype=torch.int32)
        a, w = torch.zeros(20, 72, dtype=torch.bfloat16), torch.zeros(3, 128, 72, dtype=torch.bfloat16)
        gpu_experts.launch_rows(a, w.transpose(1, 2), None, offsets, gpu_experts.cut(offsets, 20))

    file = tmp_path / "tiles.json"
    file.write_text(tuned_tiles.text_of({("short_rows", 16, 2): Tile(16, 32, 64, 8, 2)}))
    launch_rows()
    monkeypatch.setenv("MOEIFY_TILES", str(file))
    launch_rows()
    assert [compiled.metadata.num_warps for name, _, compiled in launches if name == "rows_kernel"] == [4, 8]
    file.write_text("{")
    with pytest.raises(ValueError, match="is not a file of tiles"):
        launch_rows()
    assert [name for name, _, _ in launches].count("rows_kernel") == 2, "nothing was launched with the broken file"
