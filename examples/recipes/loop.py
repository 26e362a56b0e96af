"""A plain training loop: convert a dense model, train all of it, and compare the loss before and after."""

from __future__ import annotations

import torch

import moeify
from examples.recipes import common


def main() -> None:
    """Convert, train, evaluate, save."""
    args = common.options(__doc__)
    model, tokenizer = common.dense_model(args.model)
    dense = common.evaluate(model, tokenizer)
    moeify.convert(model, common.CONFIG, args.layers)
    before = common.evaluate(model, tokenizer)  # equal copies: the loss of the dense model

    groups = moeify.param_groups(model, routers={"lr": 1e-3, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    for step in range(args.steps):
        loss = model.train()(**common.batch(tokenizer, common.texts(16, start=16 * step))).loss
        optimizer.zero_grad()
        loss.backward()  # the balancing loss comes with it
        optimizer.step()
    busiest = max(max(stats.load) for stats in moeify.routing_stats(model).values())
    after = common.evaluate(model, tokenizer)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    again = common.evaluate(moeify.load(args.out), tokenizer)
    print(f"loss: dense {dense:.4f}, converted {before:.4f}, trained {after:.4f}, loaded again {again:.4f}")
    print(f"busiest expert: {busiest:.0%} of the choices of its layer")


if __name__ == "__main__":
    main()
