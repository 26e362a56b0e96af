"""Routers, losses and capacity as loops over numbers, written from the papers: slow, obvious, in float64.

A number is a tensor without dimensions, so that autograd differentiates the loops too. Nothing of moeify is called.
What a paper leaves open is taken from its authors' code, which is named then.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Row = list[Any]  # of numbers
Choices = list[list[tuple[int, Any]]]  # experts and weights of each token, best first


@dataclass(frozen=True)
class Given:
    """What a router sees: tokens x[t][h], of which some are padding, in sequences of equal length; and its weights."""

    x: list[Row]
    real: list[bool]
    length: int
    weights: dict[str, list[Row]]
    bias: list[float]
    k: int

    def tokens(self) -> list[int]:
        return [t for t in range(len(self.x)) if self.real[t]]

    def sequences(self) -> list[list[int]]:
        numbers = sorted({t // self.length for t in self.tokens()})
        return [[t for t in self.tokens() if t // self.length == number] for number in numbers]

    def logits(self, name: str = "weight") -> list[Row]:
        return [[dot(row, column) for column in self.weights[name]] for row in self.x]


@dataclass(frozen=True)
class Routed:
    """The experts of each token and what multiplies their outputs; and the loss with its coefficients."""

    choices: Choices
    loss: Any = 0.0


def numbers(matrix: Tensor) -> list[Row]:
    return [list(row.unbind()) for row in matrix.unbind()]


def dot(a: Row, b: Row) -> Any:
    return sum(u * v for u, v in zip(a, b, strict=True))


def plainly(value: Any) -> float:
    """The number without its gradient: what is only compared."""
    return float(value.detach() if isinstance(value, Tensor) else value)


def softmax(row: Row) -> Row:
    exps = [value.exp() for value in row]
    return [value / sum(exps) for value in exps]


def sigmoid(value: Any) -> Any:
    return 1 / (1 + (-value).exp())


def best(row: Row, k: int) -> list[int]:
    return sorted(range(len(row)), key=lambda i: -plainly(row[i]))[:k]


def switch(given: Given) -> Routed:
    """Switch Transformer (Fedus et al. 2021), eq. 1, 2, 4-6; jitter of its code; coefficient 1e-2."""
    noise = numbers(torch.rand(len(given.x), len(given.x[0]), dtype=torch.float64))
    x = [[v * (0.99 + 0.02 * u) for v, u in zip(*rows, strict=True)] for rows in zip(given.x, noise, strict=True)]
    p = [softmax([dot(row, column) for column in given.weights["weight"]]) for row in x]
    first = [best(row, 1)[0] for row in p]
    tokens, loss = given.tokens(), 0.0
    for i in range(len(p[0])):
        f = sum(first[t] == i for t in tokens) / len(tokens)
        loss = loss + f * sum(p[t][i] for t in tokens) / len(tokens)
    return Routed([[(i, row[i])] for i, row in zip(first, p, strict=True)], 0.01 * len(p[0]) * loss)


def gshard(given: Given, threshold: float = 0.5) -> Routed:
    """GShard (Lepikhin et al. 2020), algorithm 1; E² in the loss as in its code; coefficient 1e-2."""
    logits = given.logits()
    p, experts, tokens, choices = [softmax(row) for row in logits], len(logits[0]), given.tokens(), []
    draws = torch.rand(len(p), dtype=torch.float64).tolist()
    for row, draw in zip(p, draws, strict=True):
        e1, e2 = best(row, 2)
        g1, g2 = row[e1] / (row[e1] + row[e2]), row[e2] / (row[e1] + row[e2])
        choices.append([(e1, g1), (e2, g2)] if g2 / threshold > draw else [(e1, g1)])
    mean = [sum(p[t][e] for t in tokens) / len(tokens) for e in range(experts)]
    count = [sum(choices[t][0][0] == e for t in tokens) for e in range(experts)]
    loss = sum(c / len(tokens) * m for c, m in zip(count, mean, strict=True)) / experts
    return Routed(choices, 0.01 * experts**2 * loss)


def st_moe(given: Given) -> Routed:
    """ST-MoE (Zoph et al. 2022): GShard with threshold 0.2, and the z-loss of eq. 5 with coefficient 1e-3."""
    routed, logits, tokens = gshard(given, threshold=0.2), given.logits(), given.tokens()
    z = sum(sum(value.exp() for value in logits[t]).log() ** 2 for t in tokens) / len(tokens)
    return Routed(routed.choices, routed.loss + 1e-3 * z)


def mixtral(given: Given) -> Routed:
    """Mixtral (Jiang et al. 2024), section 2.1; transformers' `load_balancing_loss_func`; coefficient 1e-3."""
    logits, tokens, choices = given.logits(), given.tokens(), []
    for row in logits:
        ids = best(row, given.k)
        choices.append(list(zip(ids, softmax([row[i] for i in ids]), strict=True)))
    p, loss = [softmax(row) for row in logits], 0.0
    for place in range(given.k):
        for e in range(len(p[0])):
            share = sum(choices[t][place][0] == e for t in tokens) / len(tokens)
            loss = loss + share * sum(p[t][e] for t in tokens) / len(tokens)
    return Routed(choices, 1e-3 * len(p[0]) * loss)


def all_probabilities(given: Given) -> list[Row]:
    return [softmax(row) for row in given.logits()]


def most_probable(p: list[Row], k: int) -> Choices:
    """The weights of OLMoE and others: the probabilities among all experts."""
    return [[(i, row[i]) for i in best(row, k)] for row in p]


def megablocks(given: Given) -> Routed:
    """MegaBlocks (Gale et al. 2022): `batched_load_balancing_loss` of its code, for one layer; coefficient 0.1."""
    p, tokens = all_probabilities(given), given.tokens()
    choices = most_probable(p, given.k)
    counts = [sum(e == i for t in tokens for i, _ in choices[t]) for e in range(len(p[0]))]
    mean = [sum(p[t][e] for t in tokens) / len(tokens) for e in range(len(p[0]))]
    return Routed(choices, 0.1 * len(p[0]) / (len(tokens) * given.k) * dot(counts, mean))


def megatron(given: Given) -> Routed:
    """Megatron's `_apply_seq_aux_loss` (each sequence by itself, then the mean), with coefficient 0.3."""
    p, losses = all_probabilities(given), []
    choices = most_probable(p, given.k)
    for tokens in given.sequences():
        counts = [sum(e == i for t in tokens for i, _ in choices[t]) for e in range(len(p[0]))]
        sums = [sum(p[t][e] for t in tokens) for e in range(len(p[0]))]
        losses.append(dot(counts, sums) * len(p[0]) / (given.k * len(tokens) ** 2))
    return Routed(choices, 0.3 * sum(losses) / len(losses))


def squared_variation(totals: Row) -> Any:
    """CV(·)² with the population's variance and the 1e-10 of tensor2tensor's `cv_squared`."""
    mean = sum(totals) / len(totals)
    return sum((total - mean) ** 2 for total in totals) / len(totals) / (mean**2 + 1e-10)


def v_moe(given: Given) -> Routed:
    """V-MoE (Riquelme et al. 2021), appendix A.2: the importance loss, here with coefficient 0.3."""
    p = all_probabilities(given)
    totals = [sum(p[t][e] for t in given.tokens()) for e in range(len(p[0]))]
    return Routed(most_probable(p, given.k), 0.3 * squared_variation(totals))


def shazeer(given: Given) -> Routed:
    """Noisy top-k (Shazeer et al. 2017), eq. 3-7 and appendix A; 1e-2 on the deviation as in tensor2tensor."""
    clean, raw = given.logits(), given.logits("noise_weight")
    draws = torch.randn(len(clean), len(clean[0]), dtype=torch.float64).tolist()
    experts, choices = range(len(clean[0])), []
    importance: Row = [0.0 for _ in experts]
    load: Row = [0.0 for _ in experts]
    for t, row in enumerate(clean):
        std = [(1 + value.exp()).log() + 1e-2 for value in raw[t]]
        noisy = [row[i] + draws[t][i] * std[i] for i in experts]
        ids = best(noisy, given.k)
        gates = softmax([noisy[i] for i in ids])
        choices.append(list(zip(ids, gates, strict=True)))
        for i in experts if given.real[t] else ():
            others = [noisy[j] for j in experts if j != i]
            kth = others[best(others, given.k)[-1]]
            load[i] = load[i] + 0.5 * torch.erfc(-(row[i] - kth) / std[i] / math.sqrt(2))
            importance[i] = importance[i] + (gates[ids.index(i)] if i in ids else 0.0)
    return Routed(choices, 0.1 * squared_variation(importance) + 0.1 * squared_variation(load))


def deepseek_v3(given: Given) -> Routed:
    """DeepSeek-V3 (2412.19437), eq. 12-20; 2 of 3 groups, each by its two best; scale 2.5, coefficient 1e-4."""
    s = [[sigmoid(value) for value in row] for row in given.logits()]
    experts, choices = len(s[0]), []
    groups = [range(first, first + experts // 3) for first in range(0, experts, experts // 3)]
    for row in s:
        shifted = [plainly(value) + b for value, b in zip(row, given.bias, strict=True)]
        strength = [sum(sorted((shifted[e] for e in group), reverse=True)[:2]) for group in groups]
        allowed = [e for g in best(strength, 2) for e in groups[g]]
        ids = [allowed[i] for i in best([shifted[e] for e in allowed], given.k)]
        choices.append([(e, 2.5 * row[e] / sum(row[i] for i in ids)) for e in ids])
    loss, sequences = 0.0, given.sequences()
    for tokens in sequences:
        for e in range(experts):
            f = experts / (given.k * len(tokens)) * sum(e in best(s[t], given.k) for t in tokens)
            loss = loss + f * sum(s[t][e] / sum(s[t]) for t in tokens) / len(tokens)
    return Routed(choices, 1e-4 * loss / len(sequences))


def expert_choice(given: Given, *, renormalize: bool = False) -> Routed:
    """Expert choice (Zhou et al. 2022), section 3.2; weights that sum to 1 as in upcycling (Komatsuzaki et al.)."""
    p, tokens = all_probabilities(given), given.tokens()
    capacity = math.ceil(len(p) * given.k / len(p[0]))
    choices: Choices = [[] for _ in p]
    for e in range(len(p[0])):
        for place in best([p[t][e] for t in tokens], capacity):
            choices[tokens[place]].append((e, p[tokens[place]][e]))
    if renormalize:
        choices = [[(e, w / sum(v for _, v in row)) for e, w in row] for row in choices]
    return Routed(choices)


def sinkhorn(given: Given) -> Routed:
    """S-BASE (Clark et al. 2022), appendix B.2, with 16 iterations; the weights are Megatron's."""
    logits, tokens = given.logits(), given.tokens()
    cost = {t: [math.exp(plainly(value)) for value in logits[t]] for t in tokens}
    columns = [1.0 for _ in logits[0]]
    for _ in range(16):
        rows = {t: 1 / len(tokens) / sum(c * d for c, d in zip(cost[t], columns, strict=True)) for t in tokens}
        columns = [1 / len(columns) / sum(cost[t][e] * rows[t] for t in tokens) for e in range(len(columns))]
    choices, p = [], [softmax(row) for row in logits]
    for t, row in enumerate(logits):
        ids = best([math.exp(plainly(value)) * d for value, d in zip(row, columns, strict=True)], given.k)
        choices.append([(e, sigmoid(row[e]) if given.k == 1 else p[t][e]) for e in ids])
    return Routed(choices)


def by_position(routed: Routed) -> list[tuple[int, int]]:
    """GShard, algorithm 1: all first choices in the order of the tokens, then all second ones."""
    most = max(len(row) for row in routed.choices)
    return [(t, k) for k in range(most) for t, row in enumerate(routed.choices) if k < len(row)]


def by_probability(routed: Routed) -> list[tuple[int, int]]:
    """Megatron's drop policy "probs": the choices with the highest probability first."""
    return sorted(by_position(routed), key=lambda at: -plainly(routed.choices[at[0]][at[1]][1]))


def batch_prioritized(routed: Routed) -> list[tuple[int, int]]:
    """V-MoE, algorithm 2: the first choices of the tokens with the highest probability, then their second ones."""
    return sorted(by_position(routed), key=lambda at: (at[1], -plainly(routed.choices[at[0]][0][1])))


def kept(given: Given, routed: Routed, capacity: int, queue: list[tuple[int, int]]) -> Choices:
    """What is left of the choices when each expert takes them one by one until it is full; padding takes no place."""
    taken: dict[int, int] = {}
    left: Choices = [[] for _ in routed.choices]
    for t, place in queue:
        e, weight = routed.choices[t][place]
        if given.real[t] and taken.get(e, 0) < capacity:
            taken[e] = taken.get(e, 0) + 1
            left[t].append((e, weight))
    return left


def expert(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """SwiGLU (Shazeer 2020, eq. 6): (silu(x W) * x V) W2."""
    gate, up = gate_up.chunk(2)
    z = gate @ x
    return down @ (z / (1 + (-z).exp()) * (up @ x))


def combined(x: Tensor, choices: Choices, gate_up: Tensor, down: Tensor) -> Tensor:
    """Shazeer et al. 2017, eq. 1: y = Σ G(x)_i E_i(x)."""
    out = [torch.zeros_like(row) for row in x]
    for t, row in enumerate(choices):
        for e, weight in row:
            out[t] = out[t] + weight * expert(x[t], gate_up[e], down[e])
    return torch.stack(out)


def soft_moe(x: Tensor, slots: Tensor, scale: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Soft MoE (Puigcerver et al. 2023), algorithms 1 and 2, of the real tokens of one sequence."""
    tokens, experts = range(len(x)), len(gate_up)
    units = [[row / ((row * row).sum().sqrt() + 1e-6) for row in rows] for rows in (x, slots)]
    logits = [[scale * (u * v).sum() for v in units[1]] for u in units[0]]
    done = []
    for s in range(len(slots)):
        d, owner = softmax([logits[t][s] for t in tokens]), s * experts // len(slots)
        done.append(expert(torch.stack([d[t] * x[t] for t in tokens]).sum(0), gate_up[owner], down[owner]))
    return torch.stack([torch.stack([c * y for c, y in zip(softmax(row), done, strict=True)]).sum(0) for row in logits])


def moved_bias(bias: list[float], choices: list[list[int]], rate: float) -> list[float]:
    """DeepSeek-V3, section 2.1.2: down by the rate if an expert is overloaded, up if it is underloaded."""
    loads = [sum(e in row for row in choices) for e in range(len(bias))]
    mean = sum(loads) / len(loads)
    return [b - rate if load > mean else b + rate if load < mean else b for b, load in zip(bias, loads, strict=True)]
