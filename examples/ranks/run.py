"""What a capacity costs on four ranks that share the experts: loss against bytes sent and memory (gloo, on CPUs)."""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import moeify
from examples import small_lm as lm
from moeify.layers import MoELayer, moe_layers
from moeify.layers.dispatch import Sent
from moeify.parallel.costs import Layer, Setup
from moeify.parallel.estimate import exchanged_bytes, kept_bytes
from moeify.routing.record import Routing

HERE = Path(__file__).parent
RANKS, EXPERTS, TOP_K = 4, 8, 2
FACTORS = (0.5, 1.0, 1.25, 2.0, None)
SHAPE = Layer(1, EXPERTS, TOP_K, lm.HIDDEN, lm.INTERMEDIATE, 2 * lm.INTERMEDIATE, 3 * lm.HIDDEN * lm.INTERMEDIATE)
SETUP = Setup((SHAPE,), 0, 4, ep=RANKS, copies=1, tokens=lm.TOKENS // RANKS, bandwidth=1.0, flops=1.0)


class Counted:
    """A dispatcher that notes what it sends: bytes to other ranks, and bytes of activations that a rank keeps."""

    def __init__(self, layer: MoELayer) -> None:
        self.inner = layer.dispatcher
        self.sent = self.most = 0

    def dispatch(self, x_TH: Tensor, routing: Routing) -> Sent:
        """Dispatch, and count rows."""
        sent = self.inner.dispatch(x_TH, routing)
        owner_TK = routing.expert_ids_TK // (EXPERTS // RANKS)  # RANKS of a dropped choice
        here = int((owner_TK == dist.get_rank()).sum())
        away = int((owner_TK < RANKS).sum()) - here
        rows = sent.x.shape[0]
        if torch.is_grad_enabled():
            self.sent += exchanged_bytes(SHAPE, SETUP, away, rows - here)
            self.most = max(self.most, kept_bytes(SHAPE, SETUP, rows))
        return sent

    def combine(self, y_RH: Tensor, sent: Sent) -> Tensor:
        """Combine."""
        return self.inner.combine(y_RH, sent)

    def abandon(self, device: torch.device, why: str) -> None:
        """Abandon."""
        self.inner.abandon(device, why)


def main() -> None:
    """Continue one dense model within each capacity on four ranks, write the table and the plot."""
    args = lm.options(__doc__)
    text = lm.Text(lm.reference_text())
    dense = lm.dense_model()
    lm.train("dense", dense, lm.optimizer_for(dense), text, round(150 * args.steps), seed=args.seed)
    rows, lines = [], []
    for factor in FACTORS:
        config = moeify.MoEConfig(
            EXPERTS, TOP_K, aux_loss=0.01, balance_level="global", capacity_factor=factor, eval_capacity_factor=factor,
            seed=args.seed,
        )  # fmt: skip
        model = moeify.convert(copy.deepcopy(dense), config)
        with TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads: a rank takes no lock of theirs
            processes: Any = multiprocessing
            processes.start_processes(train, (model, args, folder), nprocs=RANKS, start_method="fork")
            found = json.loads((Path(folder) / "found.json").read_text())
        name = "no limit" if factor is None else str(factor)
        rows.append([name, f"{found['dropped']:.1%}", f"{found['loss']:.3f}", f"{found['sent'] / 1e3:.0f}",
                     f"{found['most'] / 1e3:.0f}"])  # fmt: skip
        lines.append((found["sent"] / 1e3, found["most"] / 1e3, found["loss"]))
        print(f"capacity factor {name}: {found['loss']:.3f}", flush=True)
    header = ["capacity factor", "dropped in training", "held-out loss", "kB sent per layer, rank and step",
              "most kB kept by a layer of a rank"]  # fmt: skip
    lm.write_table(HERE, args, header, rows)
    sent, most, losses = zip(*lines, strict=True)
    lm.plot(HERE / "cost.png", args, (header[3], [("factors of 0.5 to none", sent, losses)]),
            (header[4], [("factors of 0.5 to none", most, losses)]), y="held-out loss, nats per byte")  # fmt: skip


def train(rank: int, model: nn.Module, args: argparse.Namespace, folder: str) -> None:
    """Train a converted model on this rank; the first one writes what was found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    moeify.parallelize(model, init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("efsdp", "ep"))["ep"])
    layers = list(moe_layers(model).values())
    counts = [Counted(layer) for layer in layers]
    for layer, count in zip(layers, counts, strict=True):
        layer.dispatcher = count
    optimizer, wrapped = lm.optimizer_for(model), DistributedDataParallel(model)
    steps, dropped, text = max(1, round(60 * args.steps)), [], lm.Text(lm.reference_text())
    for windows in text.batches(steps, args.seed + 1):
        optimizer.zero_grad()
        torch.autograd.backward(lm.loss_of(wrapped, windows[rank::RANKS]))
        moeify.clip_grad_norm_(model, 1.0)
        optimizer.step()
        stats = moeify.routing_stats(model).values()
        dropped.append(sum(layer.dropped for layer in stats) / sum(layer.choices for layer in stats))
    with torch.no_grad():
        loss = float(lm.loss_of(model.eval(), text.held_out()[rank::RANKS]))
    mine = [sum(dropped[-50:]) / len(dropped[-50:]), sum(count.sent for count in counts), loss]
    together = torch.tensor(mine, dtype=torch.float64)
    most = torch.tensor(max(count.most for count in counts))
    dist.all_reduce(together)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    if rank == 0:
        share, sent, loss = (together / RANKS).tolist()
        found = {"dropped": share, "loss": loss, "sent": sent / steps / len(layers), "most": int(most)}
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.barrier()


if __name__ == "__main__":
    main()
