"""Routers: which experts a token goes to, and with what weight. Pure functions on tensors.

Every router returns a `Routing` (soft MoE, which sends no token anywhere whole, has its own type). Nothing is kept
between calls, and no function waits for the device. Logits, scores and weights are float32 whatever the model
computes in, also under autocast; float64 stays float64, so that gradients can be checked.

Ties go where `torch.topk` puts them, always to k different experts. A NaN logit gives NaN weights: finding the layer
that made it is the caller's affair, because looking would wait for the device.

Shape suffixes: T tokens, H hidden width, E experts, K experts per token.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moeify.errors import ConfigError


@dataclass(frozen=True)
class Routing:
    """Where each token goes.

    Attributes:
        expert_ids_TK: int64, an expert in [0, E), or E for a place that is not used (dropped, not chosen): the expert
            computation skips it.
        weights_TK: What multiplies each expert's output.
        logits_TE: What the router's projection gave (noisy top-k: with the noise added). For the z-loss.
        scores_TE: What balancing losses take as the probability of each expert, and capacity as its priority.
        clean_logits_TE: Noisy top-k only: the logits before the noise.
        noise_std_TE: Noisy top-k only: the standard deviation of the noise on each logit.
    """

    expert_ids_TK: Tensor
    weights_TK: Tensor
    logits_TE: Tensor
    scores_TE: Tensor
    clean_logits_TE: Tensor | None = None
    noise_std_TE: Tensor | None = None


def router_init(shape: tuple[int, int], seed: int, name: str) -> Tensor:
    """Initial router weights that break ties at any width: entries N(0, 1/H).

    Their standard deviation is 1/sqrt(H), so inputs of unit root mean square (what an RMSNorm or LayerNorm gives) make
    logits of standard deviation 1: with 8 experts the first choice has probability 0.36 on average.

    The values depend on seed and name alone, not on what was drawn before or on the default device. They are drawn in
    float64, because torch's float32 sampler rounds differently on machines with different vector units.

    Args:
        shape: (E, H).
        seed: Any integer.
        name: The parameter's full name in the model.

    Returns:
        float32 (E, H), on the CPU.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "big"))
    draws_EH = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    init_EH: Tensor = draws_EH / math.sqrt(shape[-1])
    return init_EH.float()


def router_logits(x_TH: Tensor, weight_EH: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """The router's projection in float32, also under autocast (Switch Transformer's selective precision).

    Args:
        x_TH: (..., H), any float dtype.
        weight_EH: (E, H), any float dtype.
        bias_E: (E,) or None.

    Returns:
        (..., E) float32; float64 if x_TH and weight_EH are.
    """
    x_TH, weight_EH = _at_least_fp32(x_TH), _at_least_fp32(weight_EH)
    bias_E = None if bias_E is None else _at_least_fp32(bias_E)
    device = x_TH.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return F.linear(x_TH, weight_EH, bias_E)
    return F.linear(x_TH, weight_EH, bias_E)


def softmax_topk(logits_TE: Tensor, top_k: int, *, renormalize: bool = True) -> Routing:
    """The k most probable experts (Shazeer et al. 2017 without noise; Mixtral; Qwen-MoE; OLMoE).

    Softmax before the selection and renormalisation after it is the same function as softmax over the selected logits
    (Mixtral, Megatron's post-softmax), so one switch covers both orders.

    Args:
        logits_TE: (T, E), any float dtype.
        top_k: Experts per token, 1 to E.
        renormalize: Weights are the softmax over the chosen logits and sum to 1. If False, they are the probabilities
            among all E and sum to less. With top_k=1 renormalised weights are all 1 and give the router no gradient.

    Returns:
        Routing; scores are the softmax over all E.

    Raises:
        ConfigError: top_k is not in 1..E.
    """
    _check_top_k(top_k, logits_TE.shape[-1])
    logits_TE = _at_least_fp32(logits_TE)
    scores_TE = torch.softmax(logits_TE, dim=-1)
    chosen_TK, ids_TK = torch.topk(logits_TE, top_k, dim=-1)
    weights_TK = torch.softmax(chosen_TK, dim=-1) if renormalize else scores_TE.gather(-1, ids_TK)
    return Routing(ids_TK, weights_TK, logits_TE, scores_TE)


def _at_least_fp32(tensor: Tensor) -> Tensor:
    # Not a bare .float(): torch.export would record the no-op and pin the dtype that it saw.
    return tensor if tensor.dtype in {torch.float32, torch.float64} else tensor.float()


def _check_top_k(top_k: int, experts: int) -> None:
    if not 1 <= top_k <= experts:
        raise ConfigError(f"top_k is {top_k}, but there are {experts} experts: choose a number from 1 to {experts}")
