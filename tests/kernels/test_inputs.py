from __future__ import annotations

import inspect

import torch

from moeify.kernels import ops, reference
from moeify.kernels.inputs import ExpertInputs, Kept
from moeify.kernels.tools.selfcheck import Case, make_inputs


def test_fields_are_the_arguments_of_every_form_of_the_computation() -> None:
    fields = list(ExpertInputs._fields)
    assert list(inspect.signature(ops.experts).parameters) == [*fields, "implementation"]
    assert list(inspect.signature(reference.experts).parameters) == [*fields, "up_scale", "down_scale"]
    plain = [field.rpartition("_")[0] if field[-1].isupper() else field for field in fields]
    schema = torch.ops.moeify.experts_backward.default._schema
    kept = [field.rpartition("_")[0] for field in Kept._fields]
    assert [argument.name for argument in schema.arguments] == ["grad", *plain, *kept, "needs", "implementation"]


def test_sizes_are_read_from_the_tensors() -> None:
    inputs = make_inputs(Case(5, 2, 3, 8, 6, gated=False), torch.float32, torch.device("cpu"))
    assert (inputs.experts, inputs.top_k) == (3, 2)
    shapes = [None if t is None else tuple(t.shape) for t in inputs.parameters]
    assert shapes == [(3, 6, 8), (3, 8, 6), (3, 6), (3, 8)]
