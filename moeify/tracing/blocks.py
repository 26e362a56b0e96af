"""Which stacks of a model hold blocks that all do the same, so that a few of them need a trace and not all.

What a block does is written down while the whole model runs once on the meta device: every operator, and where each of
its operands comes from. That takes a twentieth of what torch.export takes. Nothing is concluded from names or classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

KEPT = 3  # blocks of a stack that are traced: the first, and two that are compared with each other
_WORTH = 12  # a shorter stack is traced as fast as it is looked through

Run = Callable[[], object]
Segments = dict[tuple[str, int], list[object]]


class Stack(NamedTuple):
    """A list of blocks of one class.

    Attributes:
        path: The list's path in the model.
        blocks: The list.
        names: The blocks' names in it.
    """

    path: str
    blocks: nn.ModuleList
    names: tuple[str, ...]


def equal_stacks(model: nn.Module, run: Run) -> tuple[Stack, ...]:
    """Return the stacks whose blocks compute the same, each from the block before it.

    Args:
        model: A model on the meta device.
        run: Runs it; what it raises means that nothing is known, and no stack is returned.
    """
    stacks = tuple(_stacks(model))
    if not stacks:
        return ()
    try:
        whole = _Record(model, stacks).of(run)
        for path, _, names in stacks:
            if any(whole.get((path, number)) != whole.get((path, 1)) for number in range(1, len(names))):
                return ()
        with shortened(stacks):
            short = _Record(model, stacks).of(run)
    except Exception:  # a forward that does not run this way is traced whole
        return ()
    kept = {(path, number): ops for (path, number), ops in whole.items() if number < KEPT}
    return stacks if kept == short else ()


@contextmanager
def shortened(stacks: Sequence[Stack]) -> Iterator[None]:
    """Leave the first `KEPT` blocks of each stack in it, inside the block."""
    held = [dict(stack.blocks._modules) for stack in stacks]
    try:
        for stack, blocks in zip(stacks, held, strict=True):
            stack.blocks._modules = dict(list(blocks.items())[:KEPT])
        yield
    finally:
        for stack, blocks in zip(stacks, held, strict=True):
            stack.blocks._modules = blocks


def _stacks(model: nn.Module) -> Iterator[Stack]:
    """Yield the outermost lists that are worth it."""
    inside = "\n"
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) >= _WORTH and not path.startswith(inside):
            alike, own = len({type(block) for block in module}) == 1, len({id(block) for block in module})
            if alike and own == len(module):
                inside = f"{path}."  # what is inside comes next
                yield Stack(path, module, tuple(module._modules))


class _Record(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What a model computes: for each block and for the rest ("", 0), its operators and their operands.

    An operand is named by where it was made: inside the same block by its number, in another block by how far back
    that block is, outside by its number there; a parameter by its path within its block.
    """

    def __init__(self, model: nn.Module, stacks: Sequence[Stack]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stacks = stacks
        self.ends = {"": 0} | {stack.path: len(stack.blocks) for stack in stacks}  # from outside, blocks count from it
        self.segments: Segments = {("", 0): []}
        self.at = ("", 0)
        self.given = 0  # tensors that are no parameters, and that nothing was seen to make
        self.made: dict[int, tuple[tuple[str, int], object]] = {}
        self.alive: list[Tensor] = []  # or else an address would be used twice
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            stack = next((s.path for s in stacks if name.startswith(f"{s.path}.")), "")
            number, _, rest = name[len(stack) + 1 :].partition(".") if stack else ("0", "", name)
            self.made[id(tensor)] = (stack, int(number)), rest

    def of(self, run: Run) -> Segments:
        """Return the record of one run."""
        with ExitStack() as hooks:
            for stack in self.stacks:
                for number, block in enumerate(stack.blocks):
                    hooks.callback(block.register_forward_pre_hook(self._entering((stack.path, number))).remove)
                    hooks.callback(block.register_forward_hook(self._leaving).remove)
            with self:
                result = run()
        self._write("output", pytree.tree_leaves(result))
        return self.segments

    def _entering(self, segment: tuple[str, int]) -> Callable[..., None]:
        def enter(*_: object) -> None:
            if segment in self.segments or self.at != ("", 0):
                raise ValueError("a block runs twice, or inside another")
            self.segments[segment] = []
            self.at = segment

        return enter

    def _leaving(self, *_: object) -> None:
        self.at = ("", 0)

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[object, ...] = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        number = self._write(str(func), pytree.tree_leaves((args, kwargs)))
        for place, leaf in enumerate(pytree.tree_leaves(result)):
            if isinstance(leaf, Tensor) and id(leaf) not in self.made:
                self.made[id(leaf)] = self.at, (number, place)
                self.alive.append(leaf)
        return result

    def _write(self, what: str, operands: Sequence[object]) -> int:
        """Write an operator down, and return its number in what runs."""
        segment = self.segments[self.at]
        segment.append((what, *map(self._name, operands)))
        return len(segment) - 1

    def _name(self, operand: object) -> object:
        if not isinstance(operand, Tensor):
            return str(operand)
        if id(operand) not in self.made:
            self.given += 1
            self.made[id(operand)] = ("", 0), f"given {self.given}"
            self.alive.append(operand)
        (stack, number), inside = self.made[id(operand)]
        here, at = self.at
        back = number - (at if here == stack else self.ends[stack])
        return stack, back, inside, tuple(operand.shape), operand.dtype
