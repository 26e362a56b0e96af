"""The dispatcher whose sizes are known beforehand: each rank sends every expert as many rows as a capacity holds.

All messages have one size, so that no host waits for counts, and dispatch and combine are one graph. Rows that no
choice fills are sent too, and nothing computes them. Ranks may have other numbers of tokens if their capacity fits.

Shape legend: T tokens, H hidden size, K choices per token, S = T·K choices, n ranks, e experts on each, E = n·e,
C choices that an expert takes of each rank, R = E·C rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moeify.errors import ConfigError
from moeify.kernels.layout import sort_by_expert
from moeify.layers.dispatch import Sent
from moeify.parallel.exchange import Link
from moeify.routing.record import Routing


@dataclass(frozen=True)
class _Ways:
    """How the results come back.

    Attributes:
        rows_S: The row of each choice among the R of this rank; R where it has none.
        choices: T and K.
    """

    rows_S: Tensor
    choices: tuple[int, int]


class StaticExpertParallel:
    """Sends every expert the same number of rows; all ranks of the group must call it.

    Args:
        link: The group, and the layer's name.
        experts: e, on each rank.
        capacity: C.
    """

    def __init__(self, link: Link, experts: int, capacity: int) -> None:
        self.link, self.experts, self.capacity = link, experts, capacity

    def dispatch(self, x_TH: Tensor, routing: Routing) -> Sent:
        """Send tokens (T, H) to their experts; no host waits.

        Raises:
            ConfigError: The layer lets an expert take more choices than there are rows for.
            MoeifyError: Another rank has stopped, or hangs.
        """
        ids_TK, weights_TK = routing.expert_ids_TK, routing.weights_TK
        self._check(routing.capacity)
        ranks, experts = self._ranks, self._ranks * self.experts
        tokens, top_k = ids_TK.shape
        order_S, offsets = sort_by_expert(ids_TK, experts)
        counts_E = offsets.long().diff()
        slots_C = torch.arange(self.capacity, device=x_TH.device)
        place_EC = torch.where(slots_C < counts_E[:, None], offsets[:-1, None].long() + slots_C, tokens * top_k)
        choice_R = _padded(order_S.long(), tokens * top_k).index_select(0, place_EC.flatten())
        got_n = self._announce(counts_E.view(ranks, self.experts), 0)
        x_SH = x_TH[:, None].expand(-1, top_k, -1).flatten(0, 1)
        x_RH = self.link.even(_padded(x_SH).index_select(0, choice_R))  # a row without a choice holds zeros
        weights_R1 = self.link.even(_padded(weights_TK.reshape(-1, 1)).index_select(0, choice_R))
        ids_e1 = torch.arange(self.experts, device=x_TH.device)[:, None]
        ids_neC = torch.where(slots_C < got_n[:, 1:, None], ids_e1, self.experts)
        rows_R = torch.arange(len(choice_R), device=x_TH.device)
        rows_S = rows_R.new_full((tokens * top_k + 1,), len(choice_R)).scatter(0, choice_R, rows_R)[:-1]
        return Sent(x_RH, ids_neC.view(-1, 1), weights_R1, _Ways(rows_S, (tokens, top_k)))

    def combine(self, y_RH: Tensor, sent: Sent) -> Tensor:
        """Send the results (R, H) back and sum those of each token, (T, H).

        Raises:
            MoeifyError: Another rank has stopped or hangs.
        """
        ways = sent.state
        assert isinstance(ways, _Ways)
        y_RH = self.link.even(y_RH)
        y_SH = _padded(y_RH).index_select(0, ways.rows_S)
        return y_SH.view(*ways.choices, y_RH.shape[1]).sum(1)

    def abandon(self, device: torch.device, why: str) -> None:
        """Stop with an error of this rank's own, and all ranks, which wait for its tokens, with the same words.

        Raises:
            MoeifyError: Always.
        """
        self._announce(torch.zeros(self._ranks, self.experts, dtype=torch.int64, device=device), 1, why)

    @property
    def _ranks(self) -> int:
        return dist.get_world_size(self.link.group)

    def _check(self, capacity: int | None) -> None:
        if capacity is None or capacity > self.capacity:
            has = "no capacity" if capacity is None else f"the capacity {capacity}"
            raise ConfigError(
                f"{self.link.path}: an expert has {has}, and messages have rows for {self.capacity} choices: give "
                "moeify.parallelize the most tokens that a rank has, and the layer a capacity factor"
            )

    def _announce(self, counts_ne: Tensor, stopped: int, why: str = "") -> Tensor:
        """Exchange the counts and whether a rank has stopped, (n, 1 + e); it is looked at where nobody waits for it."""
        told = torch.cat([torch.full_like(counts_ne[:, :1], stopped), counts_ne], 1)
        got = self.link.even(told)
        if not torch.compiler.is_compiling() and got.device.type == "cpu" and got[:, 0].any():
            self.link.stop(why)
        return got


def _padded(values_S: Tensor, value: float = 0) -> Tensor:
    """Append one row."""
    return torch.cat([values_S, values_S.new_full((1, *values_S.shape[1:]), value)])
