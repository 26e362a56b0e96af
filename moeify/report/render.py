"""The page of a report: one HTML file that loads nothing, of the report's data alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from moeify.colors import LEVELS, ramp
from moeify.errors import printable
from moeify.names import folded, quantity, short_names
from moeify.report.data import OVERLOADED, Report
from moeify.report.plots import Heat, line, load_heat, share_heat

_HUE = 137.508  # the golden angle: experts next to each other are far apart
_TIMES = "\N{MULTIPLICATION SIGN}"


def page(report: Report) -> str:
    """Return the HTML."""
    environment = Environment(loader=PackageLoader("moeify.report", "page"), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"quantity": quantity, "percent": _percent, "seconds": _seconds, "visible": _visible}
    css = environment.get_template("report.css").render(**_colors())
    script = environment.loader.get_source(environment, "report.js")[0] if environment.loader else ""
    view = {**_routing(report), **_weights(report), **_training(report), **_about(report)}
    view |= {"css": Markup(css), "js": Markup(script), "hue": _hue, "overloaded": f"{OVERLOADED:g}"}
    return environment.get_template("report.html").render(report=report, **view)


def _colors() -> dict[str, str]:
    def named(colors: Sequence[tuple[int, int, int]]) -> str:
        return " ".join(f"--q{n}: #{r:02x}{g:02x}{b:02x};" for n, (r, g, b) in enumerate(colors))

    fills = " ".join(f".q{n} {{ fill: var(--q{n}) }}" for n in range(LEVELS))
    stops = ", ".join(f"var(--q{n})" for n in range(LEVELS))
    return {"light": named(ramp(dark=False)), "dark": named(ramp(dark=True)), "fills": fills, "stops": stops}


def _routing(report: Report) -> dict[str, object]:
    layers, text = report.routing, report.text
    names = short_names([layer.name for layer in layers])
    sizes = dict.fromkeys(layer.experts for layer in layers)
    loads = []
    for size in sizes:
        some = [(name, layer.load) for name, layer in zip(names, layers, strict=True) if layer.experts == size]
        title = f"Load of {size} experts by layer, in multiples of the fair share"
        loads.append(load_heat(title, ("layer", [n for n, _ in some]), _experts(size), [load for _, load in some]))
    together = [
        share_heat(f"Of the tokens of an expert, the share that chose another too, layer {name}",
                   ("expert", _experts(layer.experts)[1]), _experts(layer.experts), layer.together)
        for name, layer in zip(names, layers, strict=True) if layer.together
    ]  # fmt: skip
    chosen = text.layers if text else ()
    return {
        "loads": loads,
        "layer_names": names,
        "most": max((max(layer.load) for layer in layers), default=1) or 1,
        "losses": list(dict.fromkeys(name for layer in layers for name in layer.losses)),
        "together": together,
        "plot_names": [name for name, layer in zip(names, layers, strict=True) if layer.together],
        "pairs": [(name, layer.pairs) for name, layer in zip(names, layers, strict=True) if layer.pairs],
        "ids_shown": bool(text and text.source == "random token ids"),
        "passage_names": short_names([layer.name for layer in chosen]),
        "choices": [{"name": layer.name, "experts": layer.experts, "weights": layer.weights} for layer in chosen],
    }


def _weights(report: Report) -> dict[str, object]:
    layers = report.weights
    names = short_names([layer.name for layer in layers])
    cosines = [
        share_heat(f"Cosine of two experts, layer {name}", ("expert", _experts(len(layer.cosine))[1]),
                   _experts(len(layer.cosine)), layer.cosine)
        for name, layer in zip(names, layers, strict=True) if layer.cosine
    ]  # fmt: skip
    far = [(name, layer.distance) for name, layer in zip(names, layers, strict=True) if layer.distance]
    farthest = max((max(distance) for _, distance in far), default=0.0)
    distances: list[Heat] = []
    if far and len({len(distance) for _, distance in far}) == 1:
        title = "Distance of each expert from the dense FFN, relative to its size"
        distances = [share_heat(title, ("layer", [name for name, _ in far]), _experts(len(far[0][1])),
                                [distance for _, distance in far], farthest)]  # fmt: skip
    return {
        "equal": bool(layers) and all(layer.farthest is not None and layer.farthest[2] == 1 for layer in layers),
        "weight_names": names,
        "cosine_names": [name for name, layer in zip(names, layers, strict=True) if layer.cosine],
        "cosines": cosines,
        "distances": distances,
        "farthest": _percent(farthest),
    }


def _training(report: Report) -> dict[str, object]:
    run = report.training
    if run is None:
        return {"lines": [], "histories": [], "history_names": []}
    names, steps = short_names([history.name for history in run.loads]), [str(step) for step in run.load_steps]
    histories = [
        load_heat(f"Load over time, layer {name}, in multiples of the fair share",
                  ("expert", _experts(len(history.load))[1]), ("step", steps), history.load)
        for name, history in zip(names, run.loads, strict=True)
    ]  # fmt: skip
    drawn = [line(curve.name, run.steps, curve.values) for curve in run.curves]
    return {"lines": [curve for curve in drawn if curve], "histories": histories, "history_names": names}


def _about(report: Report) -> dict[str, object]:
    costs = report.costs
    sizes = [] if costs is None else [("this model", costs.moe), *([("dense", costs.dense)] if costs.dense else [])]
    return {"lead": _lead(report), "figures": list(_figures(report)), "sizes": sizes, "facts": list(_facts(report))}


def _lead(report: Report) -> str:
    forms = [form for form, _ in _forms(report.layers)]
    runs = f" Runs in {', '.join(report.engines)}." if report.engines else ""
    kind = f"{report.model_type}: " if report.model_type else ""
    return f"{kind}{'; '.join(forms)}.{runs}" if forms else f"{report.model_type or 'Routing of its MoE layers'}."


def _forms(layers: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[str]]]:
    """Yield the kinds of MoE layers, and the paths of each."""
    alike: dict[str, list[str]] = {}
    for layer in layers:
        shared = f" and shared ones of {layer['shared_intermediate']}" if layer["shared_intermediate"] else ""
        size = f"{layer['experts']} experts of intermediate size {layer['intermediate']}"
        form = f"{size}{shared}, top-{layer['top_k'] or '?'}"
        alike.setdefault(form, []).append(str(layer["name"]))
    for form, paths in alike.items():
        yield f"{len(paths)} MoE layers of {form}", paths


def _figures(report: Report) -> Iterator[tuple[str, str, str]]:
    if report.costs is not None:
        yield "parameters", quantity(report.costs.moe.parameters), ""
        yield "met by a token", quantity(report.costs.moe.active), ""
    if report.text is not None and report.text.perplexity is not None:
        dense = report.text.dense_perplexity
        yield "perplexity", f"{report.text.perplexity:.4g}", "" if dense is None else f"dense {dense:.4g}"
    if report.routing:
        idle, experts = (sum(counted) for counted in zip(*((len(each.idle), each.experts) for each in report.routing),
                                                         strict=True))  # fmt: skip
        yield "experts without a token", str(idle), f"of {experts}"
        yield "busiest expert", _times(max(max(layer.load) for layer in report.routing)), "its fair share"
    for curve in report.training.curves if report.training else ():
        known = [value for value in curve.values if value is not None]
        if known and curve.name in _LAST:
            yield curve.name, _LAST[curve.name](known[-1]), "at last"


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    made = report.conversion
    yield "architecture", report.model_type
    yield "runs in", ", ".join(report.engines)
    for form, paths in _forms(report.layers):
        yield form, folded(paths)
    yield "router", ", ".join(dict.fromkeys(str(layer["router"]) for layer in report.layers))
    if made is None:
        yield "made by", "not by moeify, as far as its files say"
        return
    yield "converted", f"{made.source} to {made.target}: {made.ffns} FFNs ({made.where})"
    for name, value in made.settings.items():
        yield name.replace("_", " "), value
    if made.dtype:
        yield "stored as", made.dtype
    for remark in made.remarks:
        yield "note", remark


def _experts(count: int) -> tuple[str, list[str]]:
    return "expert", [str(number) for number in range(count)]


def _hue(experts: Sequence[int]) -> str:
    return f"{experts[0] * _HUE % 360:.0f}" if experts else "0"


def _times(number: float) -> str:
    return f"{number:.3g}{_TIMES}"


def _percent(share: float) -> str:
    return f"{share:.2%}" if 0 < share < 0.1 else f"{share:.1%}" if share % 1 else f"{share:.0%}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _visible(token: str) -> str:
    """Return a token as it can be seen."""
    return printable(token.replace("\n", "⏎").replace("\t", "⇥"), " ") or "∅"


# Numbers of a run that stand at the top of its page.
_LAST: dict[str, Callable[[float], str]] = {
    "loss": "{:.4g}".format,
    "busiest expert": _times,
    "experts without a token": "{:.3g}".format,
    "dropped choices": _percent,
}
