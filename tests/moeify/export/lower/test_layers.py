from __future__ import annotations

import pytest

from moeify.errors import RefusedError
from moeify.export.lower.layers import lower
from moeify.export.targets import MANY_EXPERTS, TARGETS
from moeify.measure import TOLERANCE, relative_difference
from tests.moeify.export.lower.layer_graph import Layer, routing, run

CPU, CUDA, PORTABLE = (TARGETS[name].forms for name in ("cpu", "cuda", "portable"))


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_cuda_is_told_that_the_bytes_are_not_packed_for_it(quantize: str) -> None:
    model = Layer(hidden=64, intermediate=128).graph()
    lower(model, CUDA[quantize])
    (node,) = [node for node in model.graph if node.op_type == "QMoE"]
    assert node.attributes["weights_prepacked"].as_int() == 0


@pytest.mark.parametrize(("experts", "domain"), [(MANY_EXPERTS, "com.microsoft"), (MANY_EXPERTS - 1, "moeify")])
def test_the_cpu_target_takes_the_operator_for_many_experts(experts: int, domain: str) -> None:
    layer = Layer(experts=experts)
    model = layer.graph()
    lower(model, CPU[None])
    assert domain in {node.domain for node in model.graph}
    inputs = routing(layer, 20)
    assert relative_difference(run(model, *inputs), layer.reference(*inputs)) <= TOLERANCE["float32"]


def test_the_portable_target_holds_standard_operators_only() -> None:
    model = Layer(experts=MANY_EXPERTS).graph()
    lower(model, PORTABLE[None])
    nodes = [*model.graph, *(node for function in model.functions.values() for node in function)]
    assert {node.domain for node in nodes} == {"", "moeify"}
    assert not {node.domain for function in model.functions.values() for node in function} - {""}


def test_the_cuda_target_waits_for_no_size_that_only_the_device_knows() -> None:
    model = Layer(hidden=8, intermediate=16).graph()
    lower(model, CUDA[None])
    assert not {"NonZero", "Split", "If", "Loop", "GatherND"} & {node.op_type for node in model.graph}


def test_there_must_be_experts_to_quantize() -> None:
    model = Layer().graph()
    lower(model, PORTABLE[None])
    with pytest.raises(RefusedError, match="no experts to quantize"):
        lower(model, CPU["int8"])
