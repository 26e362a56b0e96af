"""Small changes of Python code, each of which a good test should notice.

Messages, annotations, decorators, assertions and docstrings are left alone. The changed code is written into the source
where the old code stood, so that the rest of the file, its comments and its line numbers stay.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

N = TypeVar("N", bound=ast.AST)
Code = ast.expr | ast.stmt


@dataclass(frozen=True)
class Change:
    """One node that becomes another."""

    kind: str
    node: Code
    new: Code
    before: str
    after: str


@dataclass(frozen=True)
class Mutant:
    """A file with one change.

    Attributes:
        path: The file, relative to the root of the repository.
        line: Where the changed node begins.
        function: Qualified name of the innermost function or class, or "" outside of one.
        kind: Which sort of change it is.
        before: The code that is changed.
        after: What it becomes; "" where it is left out.
        occurrence: Which of the equal changes in the same function, from 1.
        span: First and last byte of the node in the file.
        replacement: What is written there.
    """

    path: str
    line: int
    function: str
    kind: str
    before: str
    after: str
    occurrence: int
    span: tuple[int, int]
    replacement: str

    @property
    def key(self) -> str:
        """A name that stays the same when other parts of the file change."""
        count = f" #{self.occurrence}" if self.occurrence > 1 else ""
        return f"{self.path} {self.function}: {self.before} -> {self.after or 'nothing'}{count}"

    def apply(self, source: bytes) -> bytes:
        """Return the changed file."""
        return source[: self.span[0]] + self.replacement.encode() + source[self.span[1] :]


_COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.Gt), ast.LtE: (ast.Lt, ast.GtE), ast.Gt: (ast.GtE, ast.Lt), ast.GtE: (ast.Gt, ast.LtE),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,), ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}  # fmt: skip
_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}  # fmt: skip
_FUNCTIONS = {"min": "max", "max": "min", "any": "all", "all": "any", "sorted": "list"}
_KEPT_KEYWORDS = {None, "bound", "help", "strict"}  # `**options`, types, messages, and checks of what is right anyway


def _comparison(node: ast.Compare) -> Iterator[Change]:
    for index, old in enumerate(node.ops):
        for new in _COMPARISONS[type(old)]:
            changed = ast.Compare(node.left, [*node.ops[:index], new(), *node.ops[index + 1 :]], node.comparators)
            yield Change("comparison", node, changed, ast.unparse(node), ast.unparse(changed))


def _arithmetic(node: ast.BinOp) -> Iterator[Change]:
    texts = (isinstance(side, ast.JoinedStr) or _is_text(side) for side in (node.left, node.right))
    if type(node.op) in _ARITHMETIC and not any(texts):
        changed = ast.BinOp(node.left, _ARITHMETIC[type(node.op)](), node.right)
        yield Change("arithmetic", node, changed, ast.unparse(node), ast.unparse(changed))


def _logic(node: ast.BoolOp) -> Iterator[Change]:
    other = ast.BoolOp(ast.And() if isinstance(node.op, ast.Or) else ast.Or(), node.values)
    yield Change("logic", node, other, ast.unparse(node), ast.unparse(other))
    for index, value in enumerate(node.values):
        rest = [*node.values[:index], *node.values[index + 1 :]]
        yield Change("condition left out", node, ast.BoolOp(node.op, rest) if len(rest) > 1 else rest[0],
                     ast.unparse(value), "")  # fmt: skip


def _sign(node: ast.UnaryOp) -> Iterator[Change]:
    if isinstance(node.op, ast.Not | ast.USub):
        yield Change("sign", node, node.operand, ast.unparse(node), ast.unparse(node.operand))


def _constant(node: ast.Constant) -> Iterator[Change]:
    value, others = node.value, list[object]()
    if isinstance(value, bool):
        others = [not value]
    elif isinstance(value, int):
        others = [value + 1, value - 1] if value > 0 else [value + 1]
    elif isinstance(value, float):
        others = [2 * value if value else 1.0]
    for other in others:
        yield Change("constant", node, ast.Constant(other), repr(value), repr(other))  # type: ignore[arg-type]


def _condition(node: ast.If | ast.IfExp | ast.While) -> Iterator[Change]:
    typing = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    for always in (True, False):
        if not typing and not (always and isinstance(node, ast.While)):
            yield Change("condition", node.test, ast.Constant(always), ast.unparse(node.test), str(always))


def _comprehension(node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp) -> Iterator[Change]:
    for part in node.generators:
        for test in part.ifs:
            yield Change("condition", test, ast.Constant(True), ast.unparse(test), "True")


def _call(node: ast.Call) -> Iterator[Change]:
    if isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
        other = _FUNCTIONS[node.func.id]
        if not (other == "list" and node.keywords):
            yield Change("function", node.func, ast.Name(other), node.func.id, other)
    for index, keyword in enumerate(node.keywords):
        if keyword.arg not in _KEPT_KEYWORDS:
            changed = ast.Call(node.func, node.args, [*node.keywords[:index], *node.keywords[index + 1 :]])
            yield Change("keyword left out", node, changed, ast.unparse(keyword), "")


def _element(node: ast.Set | ast.List | ast.Tuple) -> Iterator[Change]:
    table = isinstance(node, ast.Set) or all(_is_text(element) for element in node.elts)
    if table and len(node.elts) > 1:
        for index, element in enumerate(node.elts):
            rest = [*node.elts[:index], *node.elts[index + 1 :]]
            changed = ast.Tuple(rest, ast.Load()) if isinstance(node, ast.Tuple) else type(node)(rest)
            yield Change("element left out", node, changed, ast.unparse(element), "")


def _entry(node: ast.Dict) -> Iterator[Change]:
    for index, (key, value) in enumerate(zip(node.keys, node.values, strict=True)):
        if key is not None and len(node.keys) > 1:
            keys, values = [*node.keys], [*node.values]
            del keys[index], values[index]
            shown = f"{ast.unparse(key)}: {ast.unparse(value)}"
            yield Change("entry left out", node, ast.Dict(keys, values), shown, "")


def _statement(node: ast.stmt) -> Iterator[Change]:
    yield Change("statement left out", node, ast.Pass(), ast.unparse(node), "")


def _assignment(node: ast.Assign) -> Iterator[Change]:
    if all(isinstance(target, ast.Attribute | ast.Subscript) for target in node.targets):
        yield from _statement(node)


def _expression(node: ast.Expr) -> Iterator[Change]:
    if isinstance(node.value, ast.Call):
        yield from _statement(node)


_CHANGES: dict[type[ast.AST], Callable[..., Iterator[Change]]] = {
    ast.Compare: _comparison, ast.BinOp: _arithmetic, ast.BoolOp: _logic, ast.UnaryOp: _sign, ast.Constant: _constant,
    ast.If: _condition, ast.IfExp: _condition, ast.While: _condition, ast.ListComp: _comprehension,
    ast.SetComp: _comprehension, ast.DictComp: _comprehension, ast.GeneratorExp: _comprehension, ast.Call: _call,
    ast.Set: _element, ast.List: _element, ast.Tuple: _element, ast.Dict: _entry, ast.Assign: _assignment,
    ast.Expr: _expression, ast.AugAssign: _statement, ast.Raise: _statement, ast.Continue: _statement,
    ast.Break: _statement, ast.Delete: _statement,
}  # fmt: skip


def mutants(path: str, source: bytes) -> list[Mutant]:
    """Return all mutants of a file, in the order of its lines."""
    tree = ast.parse(source)
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    seen: Counter[tuple[str, ...]] = Counter()
    found = []
    for function, change in _changes(tree, ""):
        node = change.node
        span = (starts[node.lineno - 1] + node.col_offset,
                starts[(node.end_lineno or node.lineno) - 1] + (node.end_col_offset or 0))  # fmt: skip
        text = ast.unparse(ast.fix_missing_locations(change.new))
        seen[function, change.before, change.after] += 1
        found.append(
            Mutant(path, node.lineno, function, change.kind, change.before, change.after,
                   seen[function, change.before, change.after], span,
                   f"({text})" if isinstance(node, ast.expr) else text)
        )  # fmt: skip
    return found


def is_another_program(changed: bytes, source: bytes) -> bool:
    """Whether a changed file can be compiled and says something else than its source."""
    try:
        return ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source))
    except SyntaxError:
        return False


def _changes(node: ast.AST, function: str) -> Iterator[tuple[str, Change]]:
    """All changes of a node and of what it holds, each with the name of the function that it lies in."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        function = f"{function}.{node.name}".lstrip(".")
    if make := _CHANGES.get(type(node)):
        yield from ((function, change) for change in make(node))
    for child in _children(node):
        yield from _changes(child, function)


def _children(node: ast.AST) -> Iterator[ast.AST]:
    """The parts of a node that run and whose meaning a test can see."""
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            yield from (default for default in (*node.args.defaults, *node.args.kw_defaults) if default)
            yield from node.body
        case ast.ClassDef() | ast.Module():
            yield from node.body
        case ast.AnnAssign():
            yield from [node.value] if node.value else []
        case ast.Raise() | ast.Assert() | ast.JoinedStr() | ast.Import() | ast.ImportFrom():
            return
        case ast.If(test=ast.Name("TYPE_CHECKING")) | ast.Assign(targets=[ast.Name("__all__")]):
            return
        case ast.Call(func=ast.Name("TypeVar")) | ast.keyword(arg="strict" | "help"):
            return
        case _:
            yield from ast.iter_child_nodes(node)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)
