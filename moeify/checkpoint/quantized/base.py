"""What the storage formats share: the tensors of one module, the weight that they make up, integers in packed words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moeify.checkpoint.tensor_info import TensorInfo

if TYPE_CHECKING:
    import torch

_BLOCK = 128  # rows and columns, where the kernels know blocks
_WORD = 32  # bits of the integers that smaller ones are packed in


@dataclass(frozen=True)
class Parts:
    """The stored tensors of one module.

    Attributes:
        infos: What is known of each, by the rest of its name: `weight`, `weight_scale`.
        read: Reads one.
        settings: The quantization_config of the checkpoint.
    """

    infos: Mapping[str, TensorInfo]
    read: Callable[[str], torch.Tensor]
    settings: Mapping[str, object]

    def info(self, name: str) -> TensorInfo:
        """Return what is known of a tensor.

        Raises:
            ValueError: There is none of this name.
        """
        if name not in self.infos:
            raise ValueError(f"{name} is missing beside {', '.join(self.infos)}")
        return self.infos[name]

    def sizes(self, name: str) -> tuple[int, int]:
        """Return the shape of a matrix.

        Raises:
            ValueError: There is none of this name.
        """
        match self.info(name).shape:
            case (rows, columns):
                return rows, columns
            case shape:
                raise ValueError(f"{name} has shape {list(shape)}, expected a matrix")

    def check(self, name: str, *shape: int) -> None:
        """Check the shape of a tensor.

        Raises:
            ValueError: It is another.
        """
        if self.info(name).shape != shape:
            raise ValueError(f"{name} has shape {list(self.info(name).shape)}, expected {list(shape)}")


@dataclass(frozen=True)
class Weight:
    """A weight as a checkpoint without quantization has it.

    Attributes:
        shape: (out, in).
        replaces: The stored tensors in whose place it stands, by the rest of their names.
        compute: Returns its values in float32.
        numbers: As the kernels of quantized experts take it, where they do.
    """

    shape: tuple[int, ...]
    replaces: tuple[str, ...]
    compute: Callable[[], torch.Tensor]
    numbers: Numbers | None = None


@dataclass(frozen=True)
class Numbers:
    """A weight as `moeify.kernels.quantized` has it, without the dimension of the experts.

    Attributes:
        form: "fp8" or "int4".
        values: Returns e4m3 (out, in), or two numbers a byte (out, in / 2).
        scales: Returns them, in any float dtype.
        scale_shape: Their shape: rows of blocks, columns of blocks.
    """

    form: str
    values: Callable[[], torch.Tensor]
    scales: Callable[[], torch.Tensor]
    scale_shape: tuple[int, int]


def eight_bits(
    values: Callable[[], torch.Tensor], scales: Callable[[], torch.Tensor], shape: tuple[int, int],
    stored: tuple[int, ...], block: tuple[int, int] | None,
) -> Numbers | None:  # fmt: skip
    """Return e4m3 numbers whose scales are those of the whole, of rows, or of blocks of 128; None for other blocks.

    Scales are given for every row where blocks do not fill the rows: gate and up rows lie in one weight.
    """
    rows, columns = shape
    if block is None and stored not in {(), (1,), (1, 1), (rows,), (rows, 1)}:
        return None
    if block is not None and block != (_BLOCK, _BLOCK):
        return None
    groups = 1 if block is None else -(-columns // _BLOCK)
    if block is not None and rows % _BLOCK == 0:
        return Numbers("fp8", values, scales, (rows // _BLOCK, groups))
    repeats = 1 if block is None else _BLOCK

    def by_row() -> torch.Tensor:
        return scales().reshape(-1, groups).repeat_interleave(repeats, 0)[:rows].expand(rows, -1)

    return Numbers("fp8", values, by_row, (rows, groups))


def four_bits(
    values: Callable[[], torch.Tensor], scales: Callable[[], torch.Tensor], shape: tuple[int, int], groups: int
) -> Numbers | None:
    """Return integers from 0 to 15, whose middle is 8, with scales of rows and groups; None for groups of other sizes.

    Args:
        values: Returns them, (out, in).
        scales: Returns them: one value, one for each row, or a matrix (out, groups).
        shape: (out, in).
        groups: How many there are in a row.
    """
    rows, columns = shape
    size = columns // groups if groups else 0
    power = size * groups == columns and size >= 32 and size & (size - 1) == 0
    if columns % 2 or not (power or groups == 1):
        return None

    def packed() -> torch.Tensor:
        import torch

        from moeify.kernels.quantized import pack

        return pack(values().to(torch.uint8))

    return Numbers("int4", packed, lambda: scales().reshape(-1, groups).expand(rows, -1), (rows, groups))


def whole_number(settings: Mapping[str, object], name: str, *allowed: int) -> int:
    """Return a whole number of a quantization_config.

    Raises:
        ValueError: It is no whole number, or none of those allowed.
    """
    value = settings.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or (allowed and value not in allowed):
        expected = f"one of {', '.join(map(str, allowed))}" if allowed else "a whole number"
        raise ValueError(f"quantization_config has {name} = {value!r:.40}, expected {expected}")
    return value


def group_count(size: int, group: int) -> int:
    """Return how many groups of inputs there are; -1 is one group of all.

    Raises:
        ValueError: A group has no inputs.
    """
    if group != -1 and group < 1:
        raise ValueError(f"quantization_config has group_size = {group}, expected -1 or at least 1")
    return 1 if group == -1 else -(-size // group)


def packed_size(count: int, bits: int) -> int:
    """Return how many words hold `count` integers, without gaps."""
    return -(-count * bits // _WORD)


def unpack(words: torch.Tensor, bits: int, count: int, axis: int) -> torch.Tensor:
    """Return integers that are packed in words of 32 bits along an axis: number i starts at bit i times `bits`."""
    import torch

    words, mask = words.movedim(axis, -1), (1 << bits) - 1
    if _WORD % bits == 0:
        shifts = torch.arange(0, _WORD, bits, dtype=torch.int32)
        found = ((words.unsqueeze(-1) >> shifts) & mask).to(torch.uint8).flatten(-2)[..., :count]
    else:  # a number may lie in two words
        start = torch.arange(count) * bits
        first, shift = start // _WORD, start % _WORD
        wide = words.long() & 0xFFFFFFFF
        after = (first + 1).clamp(max=words.shape[-1] - 1)
        found = (((wide[..., first] >> shift) | (wide[..., after] << (_WORD - shift))) & mask).to(torch.uint8)
    return found.movedim(-1, axis)


def scaled(values: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None = None) -> torch.Tensor:
    """Multiply a matrix by its scales, one for each block of it.

    Args:
        values: (out, in).
        scale: One value; one for each row; or a matrix with one for each block.
        block: Rows and columns of a block; the last ones may be cut. None for equal blocks that fill the matrix.
    """
    values, scale = values.float(), scale.float()
    if scale.numel() == 1:
        return values.mul_(scale.reshape(()))
    scale = scale[:, None] if scale.dim() == 1 else scale
    rows, columns = block or tuple(size // count for size, count in zip(values.shape, scale.shape, strict=True))
    scale, whole = scale.repeat_interleave(rows, 0)[: len(values)], values.shape[1] // columns
    values[:, : whole * columns].view(len(values), whole, columns).mul_(scale[:, :whole, None])
    values[:, whole * columns :].mul_(scale[:, whole:])
    return values


def check_scale(
    name: str, shape: tuple[int, int], scale: tuple[int, ...], block: tuple[int, int] | None = None
) -> None:
    """Check that scales fit a matrix (see `scaled`).

    Raises:
        ValueError: They do not.
    """
    if scale in {(), (1,), (1, 1), shape[:1]}:
        return
    if len(scale) == 2 and all(scale):
        wanted = tuple(-(-size // part) for size, part in zip(shape, block, strict=True)) if block else None
        if scale == wanted or (
            block is None and not any(size % count for size, count in zip(shape, scale, strict=True))
        ):
            return
    what = f"blocks of {list(block)}" if block else "equal blocks"
    raise ValueError(f"{name} has shape {list(scale)}, which is not one value for each of the {what} of {list(shape)}")
