"""Write `docs/passes.md` from the docstrings of the passes: `python docs/write_passes.py [--print]`."""

from __future__ import annotations

import sys
from pathlib import Path

from moeify.passes.catalog import Description, describe

PAGE = Path(__file__).with_name("passes.md")

INTRODUCTION = """# The graph passes

Written by `python docs/write_passes.py` from the docstrings in `passes/`; `moeify passes` prints the same.

`moeify.convert_graph` runs them on what `torch.export.export` or `torch.fx.symbolic_trace` returned:

```python
program = torch.export.export(model, args)
graph = moeify.convert_graph(program, moeify.MoEConfig(experts=8, top_k=2))  # find_ffn, then insert_moe
graph(*args)  # trains, saves, exports again, compiles with fullgraph=True
```

`return_losses=True` adds insert_losses. `lower` is for whoever wants operators and not modules:

```python
from moeify.passes.lower import Lower

graph = Lower("reference")(graph).graph_module
```

Parameters are named as `moeify.convert` names them in the module, and the two compute the same to the last bit. Inputs
of the graph named `input_ids` and `attention_mask` reach the routers and the losses, as they do in the module.
"""

COMPILE = """
## Why there is no `torch.compile(model, backend="moeify")`

It was tried. A backend receives a graph in which the model's parameters are inputs, and returns a callable with the
same inputs. Experts that it made would be nobody's parameters: `model.parameters()`, the optimizer, `state_dict()` and
`to()` would not know them, and the dense weights, which those do know, would have no gradient. A recompilation (another
batch size, `eval()` after `train()`) would call the backend again and start from the dense weights, so training would
be lost without a word. A graph break inside an FFN would hide it.

So the conversion comes first and the compiler after it, with its own backends, in one line:

```python
compiled = torch.compile(moeify.convert(model, config), fullgraph=True)
compiled = torch.compile(moeify.convert_graph(program, config), fullgraph=True)
```
"""


def page() -> str:
    """Return the page."""
    return "\n".join([INTRODUCTION, *(_section(entry) for entry in describe())]).rstrip("\n") + "\n" + COMPILE


def _section(entry: Description) -> str:
    lines = [f"## {entry.name}", "", f"`moeify.passes.{entry.name}.{entry.class_name}`: {entry.summary}", ""]
    for title, text in (("Before", entry.before), ("After", entry.after)):
        lines += [f"{title}:", "", "```", text, "```", ""]
    if entry.notes:
        lines += [entry.notes, ""]
    lines += [f"Refuses: {entry.refuses}", ""]
    lines += [f"- `{name}`: {meaning}" for name, meaning in entry.options.items()]
    return "\n".join(lines).rstrip("\n") + "\n"


if __name__ == "__main__":
    if "--print" in sys.argv:
        sys.stdout.write(page())
    else:
        PAGE.write_text(page())
