"""Small faults for a piece of source code, each as a replacement of a span of its text.

What is for people only is left alone: docstrings, messages of errors, assertions, annotations, text.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

_COMPARISONS: dict[type[ast.cmpop], tuple[str, ...]] = {
    ast.Lt: ("<=", ">"),
    ast.LtE: ("<", ">="),
    ast.Gt: (">=", "<"),
    ast.GtE: (">", "<="),
    ast.Eq: ("!=",),
    ast.NotEq: ("==",),
    ast.In: ("not in",),
    ast.NotIn: ("in",),
    ast.Is: ("is not",),
    ast.IsNot: ("is",),
}
_ARITHMETIC: dict[type[ast.operator], str] = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "/",
    ast.Div: "*",
    ast.FloorDiv: "/",
    ast.Mod: "//",
    ast.Pow: "*",
    ast.BitAnd: "|",
    ast.BitOr: "&",
    ast.LShift: ">>",
    ast.RShift: "<<",
}
_NAMES = {
    "min": "max", "minimum": "maximum", "floor": "ceil", "any": "all", "argmin": "argmax", "zeros": "ones",
    "zeros_like": "ones_like", "even": "odd", "first": "last", "prompt": "response", "lower": "upper",
    "union": "intersection", "append": "extend", "sum": "max", "mean": "sum", "intersects": "issubset", "low": "high",
}  # fmt: skip
_OTHER_NAME = _NAMES | {other: name for name, other in _NAMES.items() if other not in _NAMES}


@dataclass(frozen=True)
class Mutant:
    """One small fault.

    Attributes:
        file: path within the project.
        line: where the changed span begins, from 1.
        statement: first and last line of the innermost statement around it; None outside functions.
        kind: what was done.
        edit: the changed text, before and after.
        before: the source of the file.
        after: the source with the fault.
    """

    file: str
    line: int
    statement: tuple[int, int] | None
    kind: str
    edit: tuple[str, str]
    before: str
    after: str

    @property
    def diff(self) -> str:
        """Unified, with one line of context."""
        lines = difflib.unified_diff(
            self.before.splitlines(), self.after.splitlines(), f"a/{self.file}", f"b/{self.file}", lineterm="", n=1
        )
        return "\n".join(lines)

    @property
    def change(self) -> str:
        """Removed and added lines, without their place: the same wherever the lines move."""
        lines = [line for line in self.diff.splitlines() if line[:1] in "+-" and line[:3] not in {"+++", "---"}]
        return "\n".join(line[0] + " ".join(line[1:].split()) for line in lines)

    @property
    def key(self) -> str:
        """Names the mutant; it stays while the changed lines stay."""
        lines = self.before.splitlines()
        text = lines[self.line - 1]
        changed = self.after.splitlines()[self.line - 1]
        nth = lines[: self.line].count(text)
        told = repr((self.file, nth, text.strip(), changed.strip(), self.edit))
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    @property
    def valid(self) -> bool:
        """Whether it is Python, and not the same Python as before."""
        try:
            return ast.dump(ast.parse(self.after)) != ast.dump(ast.parse(self.before))
        except SyntaxError:
            return False


def mutants_of(file: str, source: str) -> list[Mutant]:
    """Every mutant of a file, in the order of its text; some are not valid."""
    tree = ast.parse(source)
    visitor = _Visitor(source)
    visitor.visit(tree)
    found = []
    for start, end, text, kind in visitor.edits:
        line = source.count("\n", 0, start) + 1
        edit, after = (source[start:end], text), source[:start] + text + source[end:]
        found.append(Mutant(file, line, statement_at(tree, line), kind, edit, source, after))
    return found


def statement_at(tree: ast.Module, line: int) -> tuple[int, int] | None:
    """First and last line of the innermost statement around a line, None where importing the module runs it."""
    around: list[ast.stmt] = [
        node for node in ast.walk(tree) if isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or 0)
    ]
    functions = [node for node in around if isinstance(node, ast.FunctionDef) and line >= node.body[0].lineno]
    if not functions:
        return None
    inner = min(around, key=lambda node: (node.end_lineno or 0) - node.lineno)
    return inner.lineno, inner.end_lineno or inner.lineno


class _Visitor(ast.NodeVisitor):
    """Collects edits: start and end offset, the new text, and its kind."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.lines = source.splitlines(keepends=True)
        self.edits: list[tuple[int, int, str, str]] = []

    def _offset(self, line: int, column: int) -> int:
        return self.starts[line - 1] + len(self.lines[line - 1].encode()[:column].decode())

    def _span(self, node: ast.AST) -> tuple[int, int]:
        return self._offset(node.lineno, node.col_offset), self._offset(node.end_lineno, node.end_col_offset)

    def _text(self, node: ast.AST) -> str:
        start, end = self._span(node)
        return self.source[start:end]

    def _replace(self, node: ast.AST, text: str, kind: str) -> None:
        self.edits.append((*self._span(node), text, kind))

    def _between(self, left: ast.AST, right: ast.AST, text: str, kind: str) -> None:
        """Replace the operator between two operands; closing brackets and comments stay."""
        start, end = self._span(left)[1], self._span(right)[0]
        old = self.source[start:end]
        self.edits.append((start, end, _with_operator(old, text), kind))

    # What is for people or for the type checker.

    def visit_Raise(self, node: ast.Raise) -> None:
        self._replace(node, "pass", "statement removed")

    def visit_Assert(self, node: ast.Assert) -> None: ...

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None: ...

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for part in (*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults), *node.body):
            self.visit(part)

    def visit_Import(self, node: ast.Import) -> None: ...

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None: ...

    # Expressions.

    def visit_Compare(self, node: ast.Compare) -> None:
        operands = [node.left, *node.comparators]
        for left, operator, right in zip(operands, node.ops, operands[1:], strict=False):
            for text in _COMPARISONS[type(operator)]:
                self._between(left, right, text, "comparison")
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        text = isinstance(node.left, ast.JoinedStr | ast.List) or isinstance(getattr(node.left, "value", None), str)
        if type(node.op) in _ARITHMETIC and not text:
            self._between(node.left, node.right, _ARITHMETIC[type(node.op)], "arithmetic")
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if type(node.op) in _ARITHMETIC:
            self._between(node.target, node.value, f"{_ARITHMETIC[type(node.op)]}=", "arithmetic")
        self._replace(node, "pass", "statement removed")
        self.visit(node.value)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        self._replace(node, self._text(node.operand), "sign" if isinstance(node.op, ast.USub) else "boolean")
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        other = "or" if isinstance(node.op, ast.And) else "and"
        for left, right in pairwise(node.values):
            self._between(left, right, other, "boolean")
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        body, test, other = (f"({self._text(part)})" for part in (node.body, node.test, node.orelse))
        self._replace(node, f"{other} if {test} else {body}", "boolean")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self._replace(node, str(not value), "constant")
        elif isinstance(value, int):
            self._replace(node, str(value + 1), "off by one")
            self._replace(node, f"({value - 1})", "off by one")
        elif isinstance(value, float):
            self._replace(node, f"({value} * 2 + 0.1)", "constant")

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if isinstance(node.slice, ast.Constant) and node.slice.value == 0:
            self._replace(node.slice, "-1", "first and last")
        self.generic_visit(node)

    def visit_Slice(self, node: ast.Slice) -> None:
        for bound in (node.lower, node.upper):
            if bound is not None and not isinstance(bound, ast.Constant):
                self._replace(bound, f"{self._text(bound)} + 1", "off by one")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name == "cast" and len(node.args) == 2:  # the first is a type
            self.visit(node.args[1])
            return
        plain = [part for part in node.args if not isinstance(part, ast.Starred)]
        if len(plain) == len(node.args) > 1 and name not in {"isinstance", "getattr", "hasattr"}:
            for left, right in pairwise(plain):
                (a, b), (c, d) = self._span(left), self._span(right)
                middle = self.source[b:c]
                self.edits.append((a, d, self._text(right) + middle + self._text(left), "arguments swapped"))
        if name == "range":
            last = node.args[min(1, len(node.args) - 1)]
            self._replace(last, f"{self._text(last)} - 1", "off by one")
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in _OTHER_NAME and isinstance(node.ctx, ast.Load):
            end = self._span(node)[1]
            self.edits.append((end - len(node.attr), end, _OTHER_NAME[node.attr], "other function"))
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if node.id in _OTHER_NAME and isinstance(node.ctx, ast.Load) and node.id in {"min", "max", "any", "all", "sum"}:
            self._replace(node, _OTHER_NAME[node.id], "other function")

    # Statements.

    def visit_If(self, node: ast.If) -> None:
        if getattr(node.test, "id", "") == "TYPE_CHECKING":
            return
        self._replace(node.test, f"not ({self._text(node.test)})", "condition")
        self.generic_visit(node)

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is not None and not (isinstance(node.value, ast.Constant) and node.value.value is None):
            self._replace(node, "return None", "return")
            self.visit(node.value)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Constant):
            return
        name = ast.unparse(node.value)
        if isinstance(node.value, ast.Call) and not name.startswith(("log.", "logger.", "logging.", "warnings.")):
            self._replace(node, "pass", "statement removed")
            self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if all(isinstance(target, ast.Subscript | ast.Attribute) for target in node.targets):
            self._replace(node, "pass", "statement removed")
        self.generic_visit(node)

    def visit_Continue(self, node: ast.Continue) -> None:
        self._replace(node, "break", "statement removed")

    def visit_Break(self, node: ast.Break) -> None:
        self._replace(node, "continue", "statement removed")


_OPERATORS = (
    "not in",
    "is not",
    "<<=",
    ">>=",
    "**=",
    "//=",
    "<=",
    ">=",
    "==",
    "!=",
    "<<",
    ">>",
    "**",
    "//",
    "+=",
    "-=",
)
_OPERATORS += ("*=", "/=", "%=", "|=", "&=", "and", "or", "in", "is", "<", ">", "+", "-", "*", "/", "%", "|", "&")


def _with_operator(text: str, operator: str) -> str:
    """Text between two operands, which may hold brackets, with its operator replaced."""
    places = [(place, -len(old), old) for old in _OPERATORS if (place := text.find(old)) >= 0]
    place, _, old = min(places)
    return text[:place] + operator + text[place + len(old) :]


def sample(mutants: Iterator[Mutant], count: int, seed: int) -> list[Mutant]:
    """A seeded sample, at most one mutant for a line and kind; it changes little when the code changes little."""

    def drawn(mutant: Mutant) -> str:
        return hashlib.sha256(f"{seed} {mutant.key} {mutant.kind}".encode()).hexdigest()

    taken: dict[tuple[str, int, str], Mutant] = {}
    for mutant in sorted(mutants, key=drawn):
        place = (mutant.file, mutant.line, mutant.kind)
        if place not in taken and mutant.valid:
            taken[place] = mutant
        if len(taken) == count:
            break
    return list(taken.values())
