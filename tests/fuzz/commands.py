"""What a case types: a command with its arguments, and the files that odd arguments name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.fuzz.damage import files, jsons, yamls

Command = Callable[[Random, Path], list[str]]
BASE = ["--experts", "3", "--top-k", "2"]
DST = "dst"


def inspect(rng: Random, src: Path) -> list[str]:
    return ["inspect", src.name, *rng.choice(([], ["--json"], ["--ep", "3"]))]


def families(rng: Random, src: Path) -> list[str]:
    return ["families", src.name, *rng.choice(([], ["--json"]))]


def convert(rng: Random, src: Path) -> list[str]:
    """A conversion, in one of its ways."""
    way = rng.choice(("", "", "--no-verify", "--to moeify", "--resume", "--to moeify --no-verify", "--dry-run",
                      "--dry-run --json", "--shard-size 9KB", "--dtype bfloat16", "--strict", "--dry-run --ep 3",
                      "--shard-size 9KB --workers 2"))  # fmt: skip
    return ["convert", src.name, DST, *BASE, *way.split()]


def convert_dequantized(rng: Random, src: Path) -> list[str]:
    return [*convert(rng, src), *rng.choice(([], *[["--dequantize"]] * 5))]


def convert_pickle(rng: Random, src: Path) -> list[str]:
    return [*convert(rng, src), *rng.choice(([], ["--allow-pickle"], ["--allow-pickle"]))]


def convert_gguf(rng: Random, src: Path) -> list[str]:
    """A conversion into one file, for which the tokenizer is read too."""
    way = rng.choice(("", "", "--no-verify", "--dtype q8_0", "--dtype f16", "--overwrite", "--to qwen2_moe"))
    return ["convert", src.name, "out.gguf", *BASE, *way.split()]


def convert_trusted(rng: Random, src: Path) -> list[str]:
    return [*convert(rng, src), *rng.choice(([], ["--trust-remote-code"]))]


def verify(rng: Random, src: Path) -> list[str]:
    """Compare the damaged MoE with what it was made of."""
    return ["verify", str(_whole("llama")), src.name, *rng.choice(([], ["--json"]))]


def verify_text(rng: Random, src: Path) -> list[str]:
    """Compare them on a text, through the tokenizer beside the MoE."""
    texts = ("w1 w2 w3", "w1 " * 9999, "", " \n", "unknown", "\x1b[1m", "\u202e é 模型 \0")
    (src.parent / "text.txt").write_text(rng.choice(texts))
    if rng.random() < 0.2:
        rng.choice((files.append, files.in_its_place))(rng, src.parent / "text.txt")
    return [*verify(rng, src), "--text", "text.txt"]


def verify_dense(rng: Random, src: Path) -> list[str]:
    """Compare a damaged dense model with what was made of it when it was whole."""
    return ["verify", src.name, str(_whole("mixtral"))]


def report(rng: Random, src: Path) -> list[str]:
    """A report on a damaged MoE, on a text of its words or on another."""
    (src.parent / "text.txt").write_text(rng.choice(("w1 w2 w3", "", "unknown", "\u202e \x1b[1m w3", "w1 " * 99)))
    how = rng.choice(([], [str(_whole("llama"))], ["--text", "text.txt"], ["--text", "text.txt"]))
    return ["report", src.name, *how, "--json"]


def report_run(rng: Random, src: Path) -> list[str]:
    return ["report", src.name, *rng.choice((["--json"], ["--json"], ["--output", DST]))]


def export(rng: Random, src: Path) -> list[str]:
    return ["export", src.name, "out.onnx"]


def export_dense(rng: Random, src: Path) -> list[str]:
    """An export that converts on the way, or not."""
    return [*export(rng, src), *rng.choice(([], BASE))]


def again(rng: Random, src: Path) -> list[str]:
    """An MoE where a dense model is expected."""
    return rng.choice((["convert", src.name, DST, *BASE], ["inspect", src.name], ["verify", src.name, src.name],
                       ["verify", src.name, str(_whole("mixtral"))], ["export", src.name, "out.onnx", *BASE],
                       ["convert", src.name, src.name, *BASE, "--overwrite"]))  # fmt: skip


def go_on(rng: Random, src: Path) -> list[str]:
    """A conversion where an interrupted one left its files."""
    way = rng.choice((["--resume"], ["--resume"], ["--resume", "--overwrite"], [], ["--overwrite"], ["--dry-run"]))
    return ["convert", src.name, DST, *BASE, "--shard-size", "9000", *way]


def odd_export(rng: Random, src: Path) -> list[str]:
    """Settings of an export that nobody means."""
    words = ("", "x", "[/b]", "a\nb", "cuda", "portable", "int4", "int3", "float16", "__class__", "9" * 5000, "-1")
    option = rng.choice(("--target", "--quantize", "--dtype", "--layers", "--experts", "--set", "--preset"))
    return [*export(rng, src), *rng.choice(([], BASE)), option, rng.choice(words)]


def run(rng: Random, src: Path) -> list[str]:
    prompts = ("w1", "w1 w2", "w0 w1 w2 w3", "unknown", "", " ", "\x1b[1m")
    return ["run", src.name, "--threads", "1", "--prompt", rng.choice(prompts), "--max-new-tokens", rng.choice("139")]


def odd_options(rng: Random, src: Path) -> list[str]:
    """Numbers and words that nobody means."""
    numbers = ("0", "-1", "1", "1000000000", str(10**30), "9" * 5000, "x", "", "²", "1e3", "3.5", "nan")
    words = ("", "x", "[/b]", "a\nb", "\x1b[1m", "__class__", "../x", "²")
    layers = ("all", "every:0", "every:²", "last:99", "first:-1", "0,99", "9" * 5000, "3-1", "(", "(a+)+$",
              "0-99999999999", "", ".*", "every:" + "9" * 5000)  # fmt: skip
    sizes = ("0", "1", "1B", "999999999999999999TB", "1e9", "-1GB", "nan", "9" * 400 + "TB", "9KB")
    settings = ("z_loss=nan", "z_loss=inf", "z_loss=" + "9" * 5000, "router.x=1", "router=1", "seed=-1", "seed=1e400",
                "experts=2", "=", "a.b.c=1", "method.share=2", "capacity_factor=0", "\x1b=1", "start=none")  # fmt: skip
    odd = (
        ["--experts", rng.choice(numbers), "--top-k", "1"],
        ["--experts", "4", "--top-k", rng.choice(numbers)],
        [*BASE, "--granularity", rng.choice(numbers)],
        [*BASE, "--shared-experts", rng.choice(numbers)],
        [*BASE, "--seed", rng.choice(numbers)],
        [*BASE, "--layers", rng.choice(layers)],
        [*BASE, "--shard-size", rng.choice(sizes)],
        [*BASE, "--set", rng.choice(settings)],
        [*BASE, rng.choice(("--router", "--method", "--to", "--preset")), rng.choice(words)],
        ["--preset", "deepseek_v3", "--experts", rng.choice(numbers)],
        [*BASE, "--overwrite", "--resume"],
    )
    return ["convert", src.name, DST, *rng.choice(odd), *rng.choice(([], ["--dry-run"], ["--no-verify"]))]


def odd_plan(rng: Random, src: Path) -> list[str]:
    """A saved plan that was changed."""
    path, sites = src.parent / "plan.json", ("path", "target", "learned", "sites", "config", "version")
    path.write_text(_whole_plan())
    kinds = (lambda rng, path: jsons.of_values(rng, path, sites), files.of_text, files.flip, files.in_its_place)
    kinds[rng.choice((0, 0, 0, 0, 1, 2, 3))](rng, path)
    return ["convert", src.name, DST, "--plan", path.name, *rng.choice(([], ["--no-verify"], ["--dry-run"]))]


def odd_recipe(rng: Random, src: Path) -> list[str]:
    """A recipe that was changed, for a conversion whose places are typed."""
    fields: dict[str, object] = {"experts": 3, "top-k": 2, "router": "softmax", "method": "noise", "layers": "last:2",
                                 "set": {"z_loss": 1e-3, "method.share": 0.5}, "no-verify": True}  # fmt: skip
    names = ("plan", "preset", "to", "dtype", "shard-size", "strict", "example-inputs", "trust-remote-code", "dry-run")
    yamls.recipe(rng, src.parent / "recipe.yaml", fields, names)
    return ["convert", src.name, DST, "--config", "recipe.yaml", *rng.choice(([], [], ["--dry-run"], BASE))]


def odd_inputs(rng: Random, src: Path) -> list[str]:
    """Example inputs that a model cannot take."""
    path = src.parent / rng.choice(("in.json", "in.json", "in.json", "in.pt", "in.safetensors", "in.npz", "in"))
    ids: tuple[object, ...] = ([[1, 2, 3]], [[10**6]], [[-1]], [[1.5]], [[2**70]], [], [[]], [[1], [2, 3]], "x", None,
                               {"shape": [1, 3 * 10**8], "dtype": "int64"}, {"shape": [-1]}, {"shape": "x"},
                               {"shape": [2**40, 2**40], "dtype": "int64"}, {"shape": [1, 4], "dtype": "quint8"},
                               {"shape": [1, 4], "dtype": "__name__"}, {"shape": [1, 4], "dtype": "int64"})  # fmt: skip
    name = rng.choice(("input_ids", "input_ids", "inputs_embeds", "x\nError: y"))
    path.write_text(json.dumps({name: rng.choice(ids)}))
    if rng.random() < 0.3:
        rng.choice((files.of_text, files.in_its_place))(rng, path)
    command = rng.choice((["inspect", src.name], ["convert", src.name, DST, *BASE]))
    return [*command, "--example-inputs", path.name]


def odd_places(rng: Random, src: Path) -> list[str]:
    """SRC and DST that are no ordinary names, or something else than a folder."""
    work, long, name = src.parent, "x" * 300, src.name
    os.mkfifo(work / "pipe")
    (work / "loop").symlink_to("loop")
    (work / "dangling.gguf").symlink_to("nowhere")
    (work / "folder.gguf").mkdir()
    (work / "model").symlink_to(name)
    (work / "file").write_text("x")
    (work / "sink").symlink_to("nowhere")
    (work / "beside").symlink_to(".dst.other")
    (work / "empty").mkdir()
    sources = (long, "~nosuchuser", "~nosuchuser/x", "pipe", "loop", "dangling.gguf", "folder.gguf", "model", "file",
               "/dev/null", "/dev/zero", "/proc/self", ".", "", "a/b/c", "[/b]", "\udcff", "x" * 5000, "/",
               f"{name}/config.json", f"{name}/../{name}", "~", "-", "--", "a\nb", f"{name}/", "d/" * 2500, "é 模型",
               "hf://x/y", "http://x/y", "x/y@z", "beside", "empty", ".dst.other", "/proc/self/fd")  # fmt: skip
    targets = (long, "y" * 250, "y" * 235, "~nosuchuser/x", "pipe", "loop", "file", "/dev/null", "/dev/null/x", name,
               f"{name}/moe", "model/moe", "n1/n2/n3", "x[/b]", "\udcff", "a\nb", ".", "..", "", "é 模型", "file/x",
               "/proc/x", "./dst/", "dst/../dst", "dst/", "~", f"~/{name}", "-", "--", "--help", "/", "//", f"{name}/",
               f"{name}/config.json", f"{name}/config.json/x", f"{name}/../{name}", "d/" * 2500 + "x", "sink", "sink/x",
               "beside", "beside/x", "empty", ".dst.moeify-partial", ".dst.other", "foreign.txt", "/dev/stdout",
               "x\x1b[1m", "\u202ex", "con", "a" * 255, "é" * 127, " ", "/sys/x", "/dev/fd/1")  # fmt: skip
    options = [*BASE, *rng.choice(([], ["--overwrite"], ["--no-verify"], ["--resume"], ["--dry-run"]))]
    match rng.choice(("src", "dst", "dst", "inspect", "export", "verify", "run")):
        case "src":
            return ["convert", rng.choice(sources), DST, *options]
        case "dst":
            return ["convert", name, rng.choice(targets), *options]
        case "inspect":
            return ["inspect", rng.choice(sources)]
        case "export":
            return ["export", rng.choice(sources), rng.choice(targets)]
        case "verify":
            return ["verify", *rng.sample([*sources, name, name, name], 2)]
    return ["run", rng.choice(sources), "--prompt", "w1"]


def _whole(name: str) -> Path:
    from tests.fuzz.sources import source

    return source(name)


def _whole_plan() -> str:
    record = json.loads((_whole("moeify") / "config.json").read_text())
    return json.dumps(record["moeify"]["plan"])
