"""What can be changed in a source file, one change at a time: its mutants.

Comparisons shift their boundary or turn round, conditions hold always or never, operands, arguments, entries
and statements go missing, numbers, words and states become others, `with`, `except` and `finally` come off.

Two things are left alone. What a log line or a span says beside that it is said (the call as a whole is
deleted, its arguments stay), and what only type checkers read: annotations, aliases, decorators, `__slots__`.
"""

import ast
import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType
from typing import Any

SAYING = {"log", "set_attribute", "set_attributes", "failed"}
"""Methods whose arguments are words for people."""

TURNED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
SHIFTED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
}
SUMS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
}
LONG, AROUND = 160, 40
"""How many characters of a statement a name shows whole, and how many around the change in a longer one."""

DELETED = (ast.Expr, ast.Raise, ast.Continue, ast.Break, ast.Delete)


@dataclass
class Mutant:
    """One change to one file.

    Attributes:
        where: The file, and the function or class in it.
        change: The statement before and after. With `where` it is the mutant's name, which lasts as long as
            the statement does.
        function: The outermost function or method that holds it; None where it works when the module is imported.
        lines: Where the changed statement begins, for the choice of the tests that run it.
    """

    file: Path
    where: str
    change: str
    function: str | None
    lines: frozenset[int]
    _tree: ast.Module = field(repr=False)
    _slot: "Slot" = field(repr=False)

    @property
    def name(self) -> str:
        return f"{self.where}: {self.change}"

    def code(self) -> CodeType:
        """The module with the change. The source is as it was afterwards."""
        self._slot.swap()
        try:
            return compile(ast.fix_missing_locations(self._tree), str(self.file), "exec")
        finally:
            self._slot.swap()


@dataclass
class Slot:
    """A place in the tree, and what to put there."""

    parent: ast.AST
    field: str
    index: int | None
    other: Any

    def swap(self) -> None:
        if self.index is None:
            before = getattr(self.parent, self.field)
            setattr(self.parent, self.field, self.other)
        else:
            listed = getattr(self.parent, self.field)
            before, listed[self.index] = listed[self.index], self.other
        self.other = before


def mutants_of(file: Path, name: str, only: frozenset[str] | None = None) -> list[Mutant]:
    """Every mutant of a file, in the order of its lines.

    Args:
        name: What the file is called in the mutants' names.
        only: The functions to change; None: all of the file.
    """
    tree = ast.parse(file.read_text())
    found: list[Mutant] = []
    seen: Counter[str] = Counter()
    for place in _places(tree, tree, ()):
        if only is not None and place.function not in only:
            continue
        where = f"{name} {place.function or '.'.join(place.scope)}".rstrip()
        before = _head(place.statement)
        for other in _others(place):
            slot = Slot(place.parent, place.field, place.index, other)
            slot.swap()
            try:
                after = _head(other if place.node is place.statement else place.statement)
            finally:
                slot.swap()
            change = _change(before, after)
            seen[f"{where}: {change}"] += 1
            again = seen[f"{where}: {change}"]
            change += f" ({again})" if again > 1 else ""
            found.append(Mutant(file, where, change, place.function, _lines(place.statement), tree, slot))
    return found


@dataclass
class _Place:
    """A node, where it hangs, and the statement that it is a part of."""

    node: ast.AST
    parent: ast.AST
    field: str
    index: int | None
    statement: ast.AST
    scope: tuple[str, ...]
    function: str | None


def _places(node: ast.AST, statement: ast.AST, scope: tuple[str, ...], function: str | None = None) -> Iterator[_Place]:
    """Every node below this one that may be changed."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "bases", "ctx", "ops", "op"):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or _is_left_alone(child, node, function):
                continue
            inner_scope, inner_function = scope, function
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and function is None:
                inner_scope = (*scope, child.name)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and name == "body" and function is None:
                inner_function = ".".join(scope)
            inner = child if isinstance(child, ast.stmt | ast.ExceptHandler) else statement
            yield _Place(child, node, name, index, inner, inner_scope, inner_function)
            if not isinstance(child, ast.JoinedStr):
                yield from _places(child, inner, inner_scope, inner_function)


def _is_left_alone(child: ast.AST, parent: ast.AST, function: str | None) -> bool:
    if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
        return True  # a docstring
    if isinstance(child, ast.Assign) and function is None:
        names = {target.id for target in child.targets if isinstance(target, ast.Name)}
        return bool(names & {"__slots__", "__all__"}) or _is_alias(child.value)
    if isinstance(child, ast.Import | ast.ImportFrom | ast.Global | ast.Nonlocal):
        return True
    return isinstance(parent, ast.Call) and _called(parent) in SAYING


def _is_alias(value: ast.AST) -> bool:
    """Whether this is another name for a class, or for several."""
    return isinstance(value, ast.Name | ast.Subscript) or (
        isinstance(value, ast.BinOp) and isinstance(value.op, ast.BitOr) and _is_alias(value.left)
    )


def _called(call: ast.Call) -> str:
    """The name of the function or method that is called, without what it is called on."""
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else ""


def _with(node: Any, **changes: Any) -> Any:
    """A copy of the node, changed."""
    other = copy.copy(node)
    for name, value in changes.items():
        setattr(other, name, value)
    return other


def _without(listed: list[Any], index: int) -> list[Any]:
    return listed[:index] + listed[index + 1 :]


def _constant(value: object) -> ast.Constant:
    return ast.Constant(value=value)  # type: ignore[arg-type]


def _always(body: list[ast.stmt]) -> ast.If:
    return ast.If(test=_constant(True), body=body, orelse=[])


def _others(place: _Place) -> Iterator[ast.AST]:
    """What may stand in place of the node."""
    node, parent = place.node, place.parent
    if isinstance(node, ast.stmt):
        yield from _other_statements(node, place.function is not None)
    elif isinstance(node, ast.Compare):
        for index, op in enumerate(node.ops):
            # Where it is the whole condition, that holds always and never besides.
            turned = None if isinstance(parent, ast.If | ast.IfExp) and len(node.ops) == 1 else TURNED.get(type(op))
            if other := SHIFTED.get(type(op)) or turned:
                yield _with(node, ops=[*node.ops[:index], other(), *node.ops[index + 1 :]])
    elif isinstance(node, ast.BoolOp):
        for index in range(len(node.values)):
            left = _without(node.values, index)
            yield left[0] if len(left) == 1 else _with(node, values=left)
    elif isinstance(node, ast.UnaryOp):
        if not isinstance(node.operand, ast.Constant):
            yield node.operand
    elif isinstance(node, ast.BinOp):
        if isinstance(node.op, ast.BitOr):
            yield from (node.left, node.right)
        else:
            yield _with(node, op=SUMS[type(node.op)]())
    elif isinstance(node, ast.IfExp):
        yield from (node.body, node.orelse)
    elif isinstance(node, ast.comprehension):
        for index in range(len(node.ifs)):
            yield _with(node, ifs=_without(node.ifs, index))
    elif isinstance(node, ast.Call):
        yield from _other_calls(node)
    elif isinstance(node, ast.Dict):
        for index in range(len(node.keys)):
            yield _with(node, keys=_without(node.keys, index), values=_without(node.values, index))
    elif isinstance(node, ast.Set) or (isinstance(node, ast.Tuple) and isinstance(parent, ast.Compare)):
        for index in range(len(node.elts)):
            yield _with(node, elts=_without(node.elts, index))
    elif isinstance(node, ast.Slice):
        if node.lower is not None:
            yield _with(node, lower=None)
        if node.upper is not None:
            yield _with(node, upper=None)
    elif isinstance(node, ast.JoinedStr):
        yield _constant("")
    elif isinstance(node, ast.Constant):
        yield from _other_constants(node.value)
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "State":
        yield _with(node, attr="VOIDED" if node.attr != "VOIDED" else "SETTLED")


def _other_statements(node: ast.stmt, in_function: bool) -> Iterator[ast.AST]:
    if isinstance(node, DELETED):
        yield ast.Pass()
    elif isinstance(node, ast.Return):
        if node.value is None:
            yield ast.Pass()
        elif not (isinstance(node.value, ast.Constant) and node.value.value is None):
            yield ast.Return(value=None)
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        if in_function and node.value is not None and not isinstance(node.value, ast.Constant):
            yield _with(node, value=_constant(None))
    elif isinstance(node, ast.AugAssign):
        yield ast.Assign(targets=[node.target], value=node.value)
        if type(node.op) in SUMS:
            yield _with(node, op=SUMS[type(node.op)]())
    elif isinstance(node, ast.If):
        yield _with(node, test=_constant(True))
        yield _with(node, test=_constant(False))
    elif isinstance(node, ast.While):
        yield _with(node, test=_constant(False))
    elif isinstance(node, ast.For):
        yield _with(node, iter=ast.Tuple(elts=[], ctx=ast.Load()))
    elif isinstance(node, ast.With | ast.AsyncWith):
        if all(item.optional_vars is None for item in node.items):
            yield _always(node.body)
    elif isinstance(node, ast.Try):
        for index in range(len(node.handlers)):
            fewer = _with(node, handlers=_without(node.handlers, index))
            yield fewer if fewer.handlers or fewer.finalbody else _always([*node.body, *node.orelse])
        if node.finalbody:
            yield _with(node, finalbody=[]) if node.handlers else _always(node.body)


def _other_calls(node: ast.Call) -> Iterator[ast.AST]:
    called = _called(node)
    if called in SAYING | {"isinstance", "len", "TypeVar"}:
        return
    if called == "shield":
        yield node.args[0]
    for index, argument in enumerate(node.args):
        if not isinstance(argument, ast.Starred | ast.Constant | ast.JoinedStr):
            yield _with(node, args=[*node.args[:index], _constant(None), *node.args[index + 1 :]])
    for index, keyword in enumerate(node.keywords):
        # A constant is made another anyway.
        if not isinstance(keyword.value, ast.JoinedStr):
            yield _with(node, keywords=_without(node.keywords, index))


def _other_constants(value: object) -> Iterator[ast.AST]:
    if isinstance(value, bool):
        yield _constant(not value)
    elif isinstance(value, int | float):
        yield _constant(value + 1)
    elif isinstance(value, str):
        yield _constant("" if value else "XX")
    elif isinstance(value, bytes):
        yield _constant(b"" if value else b"XX")


def _change(before: str, after: str) -> str:
    """One statement and another, a long one cut down to where they differ."""
    if len(before) <= LONG:
        return f"{before} → {after}"
    start = _alike(before, after)
    end = _alike(before[start:][::-1], after[start:][::-1])
    first, last = max(start - AROUND, 0), max(end - AROUND, 0)
    return f"{before[first : len(before) - last]} → {after[first : len(after) - last]}"


def _alike(one: str, other: str) -> int:
    """How many characters the two begin with in common."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _head(statement: ast.AST) -> str:
    """The statement in one line, without the statements in it."""
    dots: list[ast.stmt] = [ast.Expr(value=_constant(...))]
    shown = copy.copy(statement)
    for name in ("body", "orelse", "finalbody"):
        if getattr(shown, name, None):
            setattr(shown, name, dots if name != "orelse" or isinstance(shown, ast.Try) else [])
    if isinstance(shown, ast.Try):
        shown.handlers = [_with(handler, body=dots) for handler in shown.handlers]
    if isinstance(shown, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        shown.decorator_list = []
    return " ".join(ast.unparse(ast.fix_missing_locations(shown)).split())


def _lines(statement: ast.AST) -> frozenset[int]:
    body = getattr(statement, "body", None)
    first: int = statement.lineno  # type: ignore[attr-defined]
    last: int = body[0].lineno if body else statement.end_lineno  # type: ignore[attr-defined]
    return frozenset(range(first, last + 1))
