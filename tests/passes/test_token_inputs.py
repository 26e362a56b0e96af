from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moeify.passes.token_inputs import token_arguments

IDS, MASK = torch.zeros(3, 7, dtype=torch.int64), torch.ones(3, 7, dtype=torch.int64)


class Embed(nn.Module):
    """An activation made from some of the inputs; the others are read beside it."""

    def __init__(self, read: tuple[str, ...]) -> None:
        super().__init__()
        self.embed, self.read = nn.Embedding(17, 10), read

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        decoder_input_ids: Tensor,
        decoder_attention_mask: Tensor,
        labels: Tensor,
        pixels: Tensor,
    ) -> Tensor:
        given: dict[str, Any] = {name: value for name, value in locals().items() if name != "self"}
        x = sum(given[name] if name == "pixels" else self.embed(given[name]) for name in self.read)
        assert isinstance(x, Tensor)
        return x.tanh()


ENCODER = {"token_ids": "input_ids", "mask": "attention_mask"}
DECODER = {"token_ids": "decoder_input_ids", "mask": "decoder_attention_mask"}
CASES: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "an encoder": (("input_ids",), ENCODER),
    "an encoder that reads its mask": (("input_ids", "attention_mask"), ENCODER),
    "a decoder": (("decoder_input_ids",), DECODER),
    "a decoder that reads the encoder": (("decoder_input_ids", "input_ids"), DECODER),
    "a decoder that is told apart by its mask": (("decoder_attention_mask", "decoder_input_ids"), DECODER),
    "a decoder fed with labels": (("labels", "input_ids"), {}),
    "a tower for pixels": (("pixels",), {}),
    "pixels among tokens": (("pixels", "input_ids"), ENCODER),
}


@pytest.mark.parametrize(("read", "expected"), CASES.values(), ids=CASES)
def test_the_tokens_of_an_activation(read: tuple[str, ...], expected: dict[str, str]) -> None:
    inputs = (*(each.clone() for each in (IDS, MASK, IDS, MASK, IDS)), torch.zeros(3, 7, 10))
    graph = torch.export.export(Embed(read), inputs).module(check_guards=False).graph
    activation = graph.output_node().all_input_nodes[0]
    assert {name: str(node.target) for name, node in token_arguments(graph, activation).items()} == expected


def named(ids: Tensor, mask: Tensor, flat: bool = False) -> dict[str, str]:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(17, 10)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            x: Tensor = self.embed(input_ids) + attention_mask.sum()
            return x.flatten(0, 1) if flat else x

    graph = torch.export.export(Model(), (ids, mask)).module(check_guards=False).graph
    found = token_arguments(graph, graph.output_node().all_input_nodes[0])
    return {name: str(node.target) for name, node in found.items()}


def test_only_what_has_a_value_for_each_token_is_handed_over() -> None:
    assert named(IDS, MASK) == ENCODER
    assert named(IDS, MASK[:, None, None]) == {"token_ids": "input_ids"}
    assert named(IDS, MASK, flat=True) == {}
