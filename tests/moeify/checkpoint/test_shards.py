from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeify.checkpoint.shards import OutTensor, plan_shards
from moeify.checkpoint.tensor_info import ITEMSIZE

specs = st.lists(st.tuples(st.sampled_from(["U8", "BF16", "F32"]), st.integers(0, 9)), max_size=12)


def out(name: str, dtype: str, size: int) -> OutTensor:
    return OutTensor(name, dtype, (size,), ())


@given(specs, st.integers(1, 40))
def test_every_tensor_once_and_no_shard_too_large(specs: list[tuple[str, int]], shard_size: int) -> None:
    tensors = [out(f"t{i}", dtype, size) for i, (dtype, size) in enumerate(specs)]
    shards = plan_shards(tensors, shard_size)
    placed = [tensor for shard in shards for tensor in shard.tensors]
    assert sorted(tensor.name for tensor in placed) == sorted(tensor.name for tensor in tensors)
    for shard in shards:
        assert shard.nbytes <= shard_size or len([t for t in shard.tensors if t.nbytes]) == 1
        widths = [ITEMSIZE[tensor.dtype] for tensor in shard.tensors]
        assert widths == sorted(widths, reverse=True)
    # a shard is closed only for want of room: what comes first in the next one would not have fitted
    for shard, following in pairwise(shards):
        first = min(following.tensors, key=lambda tensor: int(tensor.name[1:]))
        assert shard.nbytes + first.nbytes > shard_size


def test_names_of_files() -> None:
    tensors = [out(f"t{i}", "U8", 4) for i in range(3)]
    assert [shard.name for shard in plan_shards(tensors, 12)] == ["model.safetensors"]
    assert [shard.name for shard in plan_shards(tensors, 8)] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_two_tensors_of_one_name() -> None:
    with pytest.raises(ValueError, match="the same name"):
        plan_shards([out("t", "U8", 1), out("t", "U8", 2)], 10)
