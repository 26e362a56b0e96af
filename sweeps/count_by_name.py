"""FFNs counted by the names and shapes of parameters: the matcher is compared with them.

Nothing here knows of graphs, and nothing of moeify is imported: the two counts can only agree by being right.
"""

from __future__ import annotations

import re

from torch import nn

Sizes = dict[str, tuple[int, int]]  # the weight of the down projection -> (hidden size, intermediate size)

# How FFNs are named: the down projection, then the up projections that may come before it.
NAMES: dict[str, tuple[str, ...]] = {
    "down_proj": ("up_proj", "gate_up_proj"), "fc2": ("fc1",), "fc_2": ("fc_1",), "wo": ("wi", "wi_0"), "w2": ("w1",),
    "c_proj": ("c_fc",), "lin2": ("lin1",), "linear2": ("linear1",), "linear_2": ("linear_1",), "fc_out": ("fc_in",),
    "dense_4h_to_h": ("dense_h_to_4h",), "output.dense": ("intermediate.dense",), "w_out": ("w_in.w_0",),
    "output_dense": ("intermediate_dense",), "ffn_output": ("ffn",), "layer_2": ("layer_1",), "pwconv2": ("pwconv1",),
    "pointwise_conv2": ("pointwise_conv1",), "linear_fc2": ("linear_fc1",), "dense2": ("dense1",), "2": ("0",),
    "output_linear": ("input_linear",), "proj_out": ("proj_in", "up_proj"), "layers.1": ("layers.0",), "3": ("1", "0"),
    "w_2": ("w_1",), "layer2": ("layer1",), "linear_out": ("linear_in",), "final_dense": ("intermediate_dense",),
    "proj_2": ("proj_1",), "lin_2": ("lin_1",), "dense_2": ("dense_1",), "Wo": ("Wi",),
    "down_proj.linear": ("up_proj.linear",), "conv2.convolution": ("conv1.convolution",),
}  # fmt: skip
# What has such names and is something else: convolution modules, projectors between towers, heads, codecs.
OTHER = re.compile(
    r"conv(_module)?\.pointwise_conv|merger|connector|project(or|ion)|aligner|bbox|quantizer|upsample|vocoder|_head|pooler"
    r"|spatial_linear|temporal_linear|object_pointer_proj|hypernetworks|output_layer"
)


def by_name(model: nn.Module, also: list[str], without: list[str]) -> Sizes:
    """Find FFNs by the names and shapes of parameters; `also` and `without` are patterns looked up by hand."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if name.endswith(".weight")}
    found: Sizes = {}
    for name, shape in shapes.items():
        pairs = [(down, up) for down, ups in NAMES.items() for up in ups if name.endswith(f".{down}.weight")]
        ups = [shapes.get(f"{name[: -len(down) - 7]}{up}.weight") for down, up in pairs]
        stored_in_out = type(model.get_submodule(name.removesuffix(".weight"))).__name__ == "Conv1D"
        sizes = next((size for up in ups if up and (size := _sizes(shape, up, stored_in_out))), None)
        other = re.search(r"\bexperts\.(\w+_)?\d", name) or OTHER.search(name)
        if any(re.search(pattern, name) for pattern in also):
            sizes, other = (shape[0], shape[1]), None
        if sizes and not other and not any(re.search(pattern, name) for pattern in without):
            found[name] = sizes
    return found


def _sizes(down: tuple[int, ...], up: tuple[int, ...], stored_in_out: bool) -> tuple[int, int] | None:
    """Return (hidden, intermediate) if the up projection reads what the down projection writes."""
    if len(down) < 2 or len(up) < 2 or {*down[2:], *up[2:]} - {1}:
        return None
    (hidden, intermediate), (rows, columns) = (s[1::-1] if stored_in_out else s[:2] for s in (down, up))
    return (hidden, intermediate) if columns == hidden and rows in {intermediate, 2 * intermediate} else None
