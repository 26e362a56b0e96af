from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from moeify.kernels.layout import routing_layout


@st.composite
def routings(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    experts, tokens, top_k = draw(st.integers(1, 9)), draw(st.integers(0, 13)), draw(st.integers(1, 4))
    ids = draw(st.lists(st.integers(-2, experts + 1), min_size=tokens * top_k, max_size=tokens * top_k))
    return torch.tensor(ids, dtype=torch.int64).reshape(tokens, top_k), experts


@given(routings())
def test_layout_is_the_stable_sort_of_the_valid_pairs(routing: tuple[torch.Tensor, int]) -> None:
    ids_TK, experts = routing
    layout = routing_layout(ids_TK, experts)
    flat = ids_TK.flatten().tolist()
    expected = [p for e in range(experts) for p, expert in enumerate(flat) if expert == e]
    skipped = [p for p, expert in enumerate(flat) if not 0 <= expert < experts]
    assert layout.order_S.tolist() == expected + skipped
    assert layout.offsets_E1.tolist() == [sum(0 <= expert < e for expert in flat) for e in range(experts + 1)]
    assert layout.inverse_S[layout.order_S.long()].tolist() == list(range(len(flat)))


def test_metadata_is_int32_and_shapes_do_not_depend_on_values() -> None:
    for dtype in (torch.int32, torch.int64):
        layout = routing_layout(torch.tensor([[0, 7], [2, -1]], dtype=dtype), 3)
        assert {layout.order_S.dtype, layout.inverse_S.dtype, layout.offsets_E1.dtype} == {torch.int32}
        assert layout.order_S.shape == layout.inverse_S.shape == (4,) and layout.offsets_E1.shape == (4,)
        assert layout.offsets_E1.tolist() == [0, 1, 1, 2]


def test_ids_of_a_type_that_cannot_hold_the_number_of_experts() -> None:
    layout = routing_layout(torch.tensor([[127, -56], [-1, 3]], dtype=torch.int8), 200)  # -56 is 200 in eight bits
    assert layout.order_S.tolist() == [3, 0, 1, 2] and layout.offsets_E1[-1] == 2
