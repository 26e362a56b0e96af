"""The dispatcher of expert parallelism: one row and one weight travel for each choice that is kept.

Choices are sorted by expert, and ranks own experts in a row, so each rank gets the rows of its experts in the order of
the tokens of all ranks. An expert then adds up in the order in which one process would: its gradients are equal to the
last bit. The owner multiplies by the weight, so that the sender keeps no results for backward.

Shape legend: T tokens, H hidden size, K choices per token, S = T·K choices in the experts' order, P of them kept,
R rows received, n ranks, e experts on each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moeify.errors import MoeifyError
from moeify.kernels.layout import invert, sort_by_expert
from moeify.layers.dispatch import Sent
from moeify.parallel.exchange import Link
from moeify.routing.record import Routing

_FIELDS = ("layer", "hidden size", "bytes of a value", "bytes of a weight", "stopped")
HEADER = len(_FIELDS)  # numbers that go before the counts


@dataclass(frozen=True)
class _Ways:
    """How the results of a forward pass come back.

    Attributes:
        inverse_S: The sorted row of each choice.
        choices: T and K.
        sent: Rows for each rank.
        received: Rows from each rank.
    """

    inverse_S: Tensor
    choices: tuple[int, int]
    sent: list[int]
    received: list[int]


class ExpertParallel:
    """Sends choices to the ranks that own their experts; all ranks of the group must call it.

    Args:
        link: The group, and the layer's name.
        experts: e, on each rank.
        widest: The largest e of the model: ranks that are at different layers must still be able to say so.
    """

    def __init__(self, link: Link, experts: int, widest: int) -> None:
        self.link, self.experts, self.widest = link, experts, widest

    def dispatch(self, x_TH: Tensor, routing: Routing) -> Sent:
        """Send tokens (T, H) to their experts; the host waits once, for the numbers of rows.

        Raises:
            MoeifyError: Another rank has stopped, hangs, or is at another layer.
        """
        ids_TK, weights_TK = routing.expert_ids_TK, routing.weights_TK
        ranks = dist.get_world_size(self.link.group)
        order_S, offsets = sort_by_expert(ids_TK, ranks * self.experts)
        counts_ne = offsets.diff().long().view(ranks, self.experts)
        got_ne, sent, received = self._sizes(counts_ne, x_TH, weights_TK)
        ways = _Ways(invert(order_S), (ids_TK.shape[0], ids_TK.shape[1]), sent, received)
        order_P = order_S[: sum(sent)]
        x_SH = x_TH[:, None].expand(-1, ids_TK.shape[1], -1).flatten(0, 1)  # then no row is read twice: no atomics
        x_RH = self.link.exchange(x_SH.index_select(0, order_P), sent, received)
        weights_R1 = self.link.exchange(weights_TK.reshape(-1, 1).index_select(0, order_P), sent, received)
        ids_ne = torch.arange(self.experts, device=x_TH.device).repeat(ranks)
        ids_R1 = ids_ne.repeat_interleave(got_ne.flatten(), output_size=sum(received))[:, None]
        return Sent(x_RH, ids_R1, weights_R1, ways)

    def combine(self, y_RH: Tensor, sent: Sent) -> Tensor:
        """Send the results (R, H) back and sum those of each token, (T, H).

        Raises:
            MoeifyError: Another rank has stopped or hangs.
        """
        ways = sent.state
        assert isinstance(ways, _Ways)
        tokens, top_k = ways.choices
        y_SH = self.link.exchange(y_RH, ways.received, ways.sent)
        if dropped := tokens * top_k - len(y_SH):
            y_SH = torch.cat([y_SH, y_SH.new_zeros(dropped, y_SH.shape[1])])  # they are last in the experts' order
        y_SH = y_SH.index_select(0, ways.inverse_S)
        return y_SH.view(tokens, top_k, y_SH.shape[1]).sum(1)

    def abandon(self, device: torch.device, why: str) -> None:
        """Stop with an error of this rank's own, and all ranks, which wait for its tokens, with the same words.

        Raises:
            MoeifyError: Always.
        """
        ranks = dist.get_world_size(self.link.group)
        self._announce(torch.zeros(ranks, self.experts, dtype=torch.int64, device=device), 0, 0, 0, 1)
        self.link.stop(why)

    def _sizes(self, counts_ne: Tensor, x_TH: Tensor, weights_TK: Tensor) -> tuple[Tensor, list[int], list[int]]:
        """Return the counts of all ranks for the experts here, and the rows for and from each rank."""
        got = self._announce(counts_ne, x_TH.shape[-1], x_TH.element_size(), weights_TK.element_size(), 0)
        got_ne = got[:, HEADER : HEADER + self.experts]
        ranks = len(counts_ne)
        read = torch.cat([counts_ne.sum(1), got_ne.sum(1), got[:, :HEADER].flatten()]).tolist()
        headers = [tuple(read[start : start + HEADER]) for start in range(2 * ranks, len(read), HEADER)]
        self._check(headers, headers[dist.get_rank(self.link.group)])
        return got_ne, read[:ranks], read[ranks : 2 * ranks]

    def _announce(self, counts_ne: Tensor, *fields: int) -> Tensor:
        """Exchange the counts, and what the ranks must agree on, (n, W + the widest e)."""
        ranks, experts = counts_ne.shape
        told = torch.zeros(ranks, HEADER + self.widest, dtype=torch.int64, device=counts_ne.device)
        told[:, :HEADER] = torch.tensor((self.link.number, *fields), device=counts_ne.device)
        told[:, HEADER : HEADER + experts] = counts_ne
        return self.link.swap(told)

    def _check(self, headers: list[tuple[int, ...]], mine: tuple[int, ...]) -> None:
        """Refuse sizes that the ranks see differently: torch would end the process (SIGABRT), or mix rows up."""
        if any(header[-1] for header in headers):
            self.link.stop("")
        for rank, header in zip(self.link.ranks, headers, strict=True):
            for name, here, there in zip(_FIELDS, mine, header, strict=True):
                if here != there:
                    what = (self.link.paths[n] for n in (here, there)) if name == "layer" else (here, there)
                    raise MoeifyError(
                        "{}: rank {} and rank {} disagree on the {} ({} and {}): every rank must run the same layers "
                        "in the same order and dtype".format(self.link.path, dist.get_rank(), rank, name, *what)
                    )
