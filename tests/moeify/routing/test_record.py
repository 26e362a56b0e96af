from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from moeify.routing.record import NO_CONTEXT, Routing
from tests.moeify.routing.draw import randn


def test_a_router_that_is_told_nothing_sees_no_padding_no_ids_and_no_limit() -> None:
    assert (NO_CONTEXT.mask_T, NO_CONTEXT.token_ids_T, NO_CONTEXT.capacity_factor) == (None, None, None)


def test_a_routing_cannot_be_changed() -> None:
    routing = Routing(randn(3, 2), randn(3, 2), randn(3, 2), randn(3, 2))
    assert routing.clean_logits_TE is routing.noise_std_TE is None
    with pytest.raises(FrozenInstanceError):
        routing.weights_TK = randn(3, 2)  # type: ignore[misc]
