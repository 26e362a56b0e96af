"""Hash: the expert of a token depends on its id in the vocabulary alone (Hash Layers, Roller et al. 2021).

Shape suffixes: T tokens, E experts, K choices per token, V ids in the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeify.config import MoEConfig
from moeify.config.checks import Count
from moeify.errors import ConfigError, MoeifyError
from moeify.routers.base import Router, RouterModule, StartValue, Zeros
from moeify.routing.record import NO_CONTEXT, Routing, RoutingContext
from moeify.seeding import generator


def hash_table(vocab_size: int, experts: int, seed: int, name: str) -> Tensor:
    """Return a random expert for each token id, as many ids for each expert: (V,) int64, on the CPU."""
    order_V = torch.randperm(vocab_size, generator=generator(seed, name), device="cpu")
    return order_V % experts


def hash_tokens(token_ids_T: Tensor, table_V: Tensor, experts: int) -> Routing:
    """Route by token id through a fixed table, with weight 1.

    Takes (T,) integers in [0, V) and a (V,) int64 table. Returns a Routing with K = 1 whose logits are zero and scores
    one-hot, for nothing is learned.
    """
    ids_TK = table_V[token_ids_T].unsqueeze(-1)
    logits_TE = torch.zeros(ids_TK.shape[0], experts, dtype=torch.float32, device=ids_TK.device)
    scores_TE = logits_TE.scatter(-1, ids_TK, 1.0)
    return Routing(ids_TK, torch.ones_like(ids_TK, dtype=torch.float32), logits_TE, scores_TE)


class HashRouter(RouterModule):
    """Module of `Hash`."""

    def __init__(self, options: Hash, hidden: int, config: MoEConfig, zeros: Zeros) -> None:
        super().__init__(config)
        self.table: Tensor
        self.register_buffer("table", zeros(options.vocab_size or 0, dtype=torch.int64))

    def forward(self, x_TH: Tensor, context: RoutingContext = NO_CONTEXT) -> Routing:
        """Look the tokens' experts up."""
        if context.token_ids_T is None:
            raise MoeifyError("hash routing needs the token ids: call the model with `input_ids`")
        return hash_tokens(context.token_ids_T, self.table, self.config.experts)

    def extra_repr(self) -> str:
        """Describe the router in `repr`."""
        return f"{self.table.shape[0]} token ids → {self.config.experts}"


@dataclass(frozen=True)
class Hash(Router):
    """By token id, through a fixed random table.

    Attributes:
        vocab_size: Number of token ids.
    """

    builds = HashRouter
    aux_loss = 0.0
    needs_token_ids = True
    has_logits = False

    vocab_size: Count | None = None

    def check(self, config: MoEConfig) -> None:
        """Check that one expert is asked for, and that the number of token ids is known."""
        if config.top_k != 1:
            raise ConfigError(f"top_k is {config.top_k}: the router 'hash' takes 1")
        if self.vocab_size is None:
            raise ConfigError("router.vocab_size is None: the router 'hash' needs the number of token ids")

    def exact(self, config: MoEConfig) -> bool:
        """Return whether no choice is dropped in evaluation: the weight is always 1."""
        return config.eval_capacity_factor is None

    def start(self, config: MoEConfig, hidden: int, path: str) -> dict[str, StartValue]:
        """Return the start value of the table."""
        ids, name = self.vocab_size or 0, f"{path}.router.table"
        return {"table": StartValue((ids,), "I64", lambda: hash_table(ids, config.experts, config.seed, name))}
