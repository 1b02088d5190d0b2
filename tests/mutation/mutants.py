"""Small changes to source code, each of which a test should notice.

A mutant is one edit of one expression: an operator exchanged, a term dropped, an axis, a constant
or a default changed, two arguments exchanged, a keyword left out, a condition reversed, a call left
out. Messages, annotations, docstrings, assertions and `raise` statements stay as they are.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

OPERATORS: dict[type[ast.operator], str] = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "//",
    ast.Pow: "*",
}  # fmt: skip
COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.In: "not in", ast.NotIn: "in", ast.Is: "is not", ast.IsNot: "is",
}  # fmt: skip
NAMES = {
    "min": "max", "max": "min", "sum": "mean", "mean": "sum", "ceil": "floor", "floor": "ceil",
    "cos": "sin", "sin": "cos", "sqrt": "square", "exp": "neg", "any": "all", "all": "any",
    "zeros": "ones", "ones": "zeros", "zeros_like": "ones_like", "ones_like": "zeros_like",
}  # fmt: skip
QUIET = ("say", "print", "console", "log", "note_event", "warn", "update", "add_row", "add_column")


@dataclass(frozen=True)
class Mutant:
    """One change: the text from `start` to `end` of a file becomes `new`.

    key: names the change by file, function and text, so that it outlives other edits of the file.
    """

    path: str
    line: int
    start: int
    end: int
    kind: str
    old: str
    new: str
    where: str
    key: str

    def applied(self, source: str) -> str:
        return source[: self.start] + self.new + source[self.end :]


def mutants(path: Path, root: Path) -> list[Mutant]:
    """Every mutant of a file, in the order of its text."""
    return list(_Finder(path.read_text(encoding="utf-8"), str(path.relative_to(root))).found())


SYMMETRIC = {"max", "min"}  # calls whose first two arguments can change places
# keyword arguments that change no result on a CPU: an assertion about lengths, layout, where to
WITHOUT_EFFECT = {"description", "strict", "indent", "device", "non_blocking"}


class _Finder:
    def __init__(self, source: str, path: str) -> None:
        self.source, self.path = source, path
        self.lines = source.splitlines(keepends=True)
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))
        self.seen: dict[str, int] = {}

    def found(self) -> Iterator[Mutant]:
        yield from self._statements(ast.parse(self.source).body, "module")

    def _statements(self, body: list[ast.stmt], where: str) -> Iterator[Mutant]:
        for statement in body:
            yield from self._statement(statement, where)

    def _statement(self, node: ast.stmt, where: str) -> Iterator[Mutant]:
        if isinstance(node, ast.FunctionDef):
            arguments = node.args
            for value in (*arguments.defaults, *arguments.kw_defaults):
                if value is not None:
                    yield from self._constant(value, node.name, "default")
            yield from self._statements(node.body, node.name)
        elif isinstance(node, ast.ClassDef):
            yield from self._statements(node.body, node.name)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            yield from self._field(node.value, where)
        elif isinstance(node, ast.Expr):
            yield from self._call_alone(node, where)
        elif isinstance(node, ast.If | ast.While):
            if "TYPE_CHECKING" in ast.unparse(node.test):
                return
            raises = any(isinstance(each, ast.Raise) for each in node.body)
            kind = "refusal" if raises else "condition"
            yield self._edit(node.test, f"not ({self._text(node.test)})", kind, where)
            yield from self._expression(node.test, where)
            yield from self._statements(node.body, where)
            yield from self._statements(node.orelse, where)
        elif not isinstance(node, ast.Raise | ast.Assert | ast.Import | ast.ImportFrom):
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.stmt):
                    yield from self._statement(child, where)
                elif isinstance(child, ast.ExceptHandler):
                    yield from self._statements(child.body, where)
                elif isinstance(child, ast.withitem):
                    yield from self._expression(child.context_expr, where)
                elif isinstance(child, ast.expr):
                    yield from self._expression(child, where)

    def _field(self, value: ast.expr, where: str) -> Iterator[Mutant]:
        """The default of a record's field, also one that stands first in `Field(...)`."""
        inner = value
        if isinstance(value, ast.Call) and ast.unparse(value.func) in ("Field", "field"):
            if not value.args:
                return
            inner = value.args[0]
        if isinstance(inner, ast.Constant | ast.UnaryOp):
            yield from self._constant(inner, where, "default")
        else:
            yield from self._expression(value, where)

    def _call_alone(self, node: ast.Expr, where: str) -> Iterator[Mutant]:
        if not isinstance(node.value, ast.Call):
            return
        if ast.unparse(node.value.func).rpartition(".")[2] in QUIET:
            return
        yield self._edit(node, "pass", "call left out", where)
        yield from self._expression(node.value, where)

    def _expression(self, node: ast.expr, where: str) -> Iterator[Mutant]:
        if isinstance(node, ast.JoinedStr | ast.Lambda):
            return
        if isinstance(node, ast.BinOp):
            yield from self._binary(node, where)
        elif isinstance(node, ast.Compare) and len(node.ops) == 1:
            yield from self._comparison(node, where)
        elif isinstance(node, ast.BoolOp):
            other = " or " if isinstance(node.op, ast.And) else " and "
            parts = [f"({self._text(value)})" for value in node.values]
            yield self._edit(node, other.join(parts), "and, or", where)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
            yield self._edit(node, self._text(node.operand), "sign", where)
        elif isinstance(node, ast.IfExp):
            swapped = f"{self._text(node.orelse)} if {self._text(node.test)} else "
            yield self._edit(node, swapped + self._text(node.body), "branches", where)
        elif isinstance(node, ast.Call):
            yield from self._call(node, where)
        elif isinstance(node, ast.Constant):
            yield from self._constant(node, where, "constant")
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                yield from self._expression(child, where)
            elif isinstance(child, ast.keyword) and child.arg not in WITHOUT_EFFECT:
                yield from self._expression(child.value, where)
            elif isinstance(child, ast.comprehension):
                for test in child.ifs:
                    yield self._edit(test, f"not ({self._text(test)})", "filter", where)
                yield from self._expression(child.iter, where)

    def _binary(self, node: ast.BinOp, where: str) -> Iterator[Mutant]:
        if type(node.op) not in OPERATORS or _is_text(node):
            return
        left, right = self._text(node.left), self._text(node.right)
        yield self._edit(node, f"({left}) {OPERATORS[type(node.op)]} ({right})", "operator", where)
        yield self._edit(node, f"({left})", "term dropped", where)

    def _comparison(self, node: ast.Compare, where: str) -> Iterator[Mutant]:
        left, right = self._text(node.left), self._text(node.comparators[0])
        sign = COMPARISONS[type(node.ops[0])]
        yield self._edit(node, f"({left}) {sign} ({right})", "comparison", where)

    def _call(self, node: ast.Call, where: str) -> Iterator[Mutant]:
        name = ast.unparse(node.func).rpartition(".")[2]
        if name in NAMES:
            text = self._text(node.func)
            yield self._edit(node.func, text[: -len(name)] + NAMES[name], "function", where)
        if (
            name not in SYMMETRIC
            and len(node.args) > 1
            and not any(isinstance(arg, ast.Starred) for arg in node.args[:2])
        ):
            first, second = node.args[:2]
            if self._text(first) != self._text(second):
                yield self._edit_span(
                    (self._span(first)[0], self._span(second)[1]),
                    f"{self._text(second)}, {self._text(first)}", "arguments", (node, where),
                )  # fmt: skip
        for keyword in node.keywords:
            if keyword.arg is None or keyword.arg in WITHOUT_EFFECT or name in QUIET:
                continue
            start, end = self._span(keyword)
            rest = self.source[end:].lstrip()
            if rest.startswith(","):
                end = self.source.index(",", end) + 1
            yield self._edit_span((start, end), "", f"no {keyword.arg}=", (node, where))

    def _constant(self, node: ast.expr, where: str, kind: str) -> Iterator[Mutant]:
        text = self._text(node)
        value = ast.literal_eval(node) if isinstance(node, ast.Constant | ast.UnaryOp) else None
        if isinstance(value, bool):
            yield self._edit(node, str(not value), kind, where)
        elif isinstance(value, int):
            yield self._edit(node, str(value + 1), kind, where)
        elif isinstance(value, float):
            yield self._edit(node, f"({text} * 2 + 0.1)", kind, where)

    def _text(self, node: ast.AST) -> str:
        start, end = self._span(node)
        return self.source[start:end]

    def _span(self, node: ast.AST) -> tuple[int, int]:
        return (
            self._offset(node.lineno, node.col_offset),  # type: ignore[attr-defined]
            self._offset(node.end_lineno, node.end_col_offset),  # type: ignore[attr-defined]
        )

    def _offset(self, line: int, column: int) -> int:
        return self.starts[line - 1] + len(self.lines[line - 1].encode()[:column].decode())

    def _edit(self, node: ast.AST, new: str, kind: str, where: str) -> Mutant:
        return self._edit_span(self._span(node), new, kind, (node, where))

    def _edit_span(
        self, span: tuple[int, int], new: str, kind: str, at: tuple[ast.AST, str]
    ) -> Mutant:
        node, where = at
        old = self.source[span[0] : span[1]]
        name = f"{self.path}:{where}:{kind}:{old}:{new}"
        count = self.seen[name] = self.seen.get(name, -1) + 1
        key = hashlib.sha256(f"{name}:{count}".encode()).hexdigest()[:10]
        return Mutant(
            path=self.path, line=node.lineno, start=span[0], end=span[1],  # type: ignore[attr-defined]
            kind=kind, old=old, new=new, where=where, key=key,
        )  # fmt: skip


def _is_text(node: ast.BinOp) -> bool:
    """Whether an operator joins or formats text, or joins types."""
    sides = (node.left, node.right)
    return any(
        isinstance(side, ast.JoinedStr)
        or (isinstance(side, ast.Constant) and isinstance(side.value, str))
        for side in sides
    )
