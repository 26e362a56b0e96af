"""An ONNX graph and the weights beside it become one file, in pieces: as a protobuf, weights are in memory three times.

A protobuf message is a row of fields in any order. So the graph is written without its large weights, and these follow
as further fields of the graph; only their lengths must be known first.
"""

from __future__ import annotations

from pathlib import Path

import onnx

_DELIMITED = 2  # the wire type of messages and bytes


def join(path: Path, data: Path) -> None:
    """Move all weights from the file beside a graph into the graph's own file.

    Args:
        path: The graph.
        data: The file beside it, which is removed.
    """
    model = onnx.load(path, load_external_data=False)
    tensors = list(model.graph.initializer)
    del model.graph.initializer[:]
    model.graph.initializer.extend(t for t in tensors if t.data_location != onnx.TensorProto.EXTERNAL)
    graph = model.graph.SerializeToString()
    model.ClearField("graph")
    weights = [_field(tensor) for tensor in tensors if tensor.data_location == onnx.TensorProto.EXTERNAL]
    with path.open("wb") as file, data.open("rb") as values:
        length = len(graph) + sum(len(head) + nbytes for head, _, nbytes in weights)
        file.write(model.SerializeToString() + _start(onnx.ModelProto.GRAPH_FIELD_NUMBER, length) + graph)
        for head, offset, nbytes in weights:
            values.seek(offset)
            file.write(head)
            file.write(values.read(nbytes))
    data.unlink()


def _field(tensor: onnx.TensorProto) -> tuple[bytes, int, int]:
    """Return what stands before the values of a weight in the graph, where the values begin, and their bytes."""
    place = {entry.key: entry.value for entry in tensor.external_data}
    offset, nbytes = int(place.get("offset", 0)), int(place["length"])
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")
    inside = tensor.SerializeToString() + _start(onnx.TensorProto.RAW_DATA_FIELD_NUMBER, nbytes)
    return _start(onnx.GraphProto.INITIALIZER_FIELD_NUMBER, len(inside) + nbytes) + inside, offset, nbytes


def _start(field: int, length: int) -> bytes:
    """Return what stands before the content of a field."""
    return _varint(field << 3 | _DELIMITED) + _varint(length)


def _varint(number: int) -> bytes:
    """Return a number in groups of seven bits, the lowest first; all but the last have the eighth bit set."""
    groups = []
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*groups, number])
