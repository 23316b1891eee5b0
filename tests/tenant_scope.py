"""The lint that every query on tenant data names whose data it is.

In the packages that keep tenant data, a function that builds a SELECT, UPDATE or DELETE must have a parameter
`principal` (the second, after `tx`, if it takes a `tx`), and each statement must have a `.where(…)` in whose arguments
the principal appears, directly or through a local name. What cannot follow the rule says why, in a comment
`# tenant-scope: <reason>` directly above the function.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("tenancy", "vault", "limits", "usage", "sessions", "jobs")
_VERBS = frozenset({"select", "update", "delete"})
_ESCAPE = re.compile(r"#\s*tenant-scope:\s*(\S.*)")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def problems(source: str, name: str) -> list[str]:
    """What is wrong in one module, as `name:line function: what`."""
    tree, lines = ast.parse(source), source.splitlines()
    tables = _imported_tables(tree) | {"table"}
    found: list[str] = []
    for function in _outermost_functions(tree):
        statements = list(_statements(function, tables))
        if not statements or _escaped(function, lines):
            continue
        found += [f"{name}:{line} {function.name}: {what}" for line, what in _check(function, statements)]
    return found


def _check(function: Function, statements: list[ast.Call]) -> Iterator[tuple[int, str]]:
    names = [arg.arg for arg in (*function.args.posonlyargs, *function.args.args)]
    positional = [name for name in names if name not in {"self", "cls"}]
    if "principal" not in names + [arg.arg for arg in function.args.kwonlyargs]:
        yield function.lineno, "queries tenant data without a principal"
        return
    if "tx" in positional and positional[:2] != ["tx", "principal"]:
        yield function.lineno, "takes tx and principal in another place than first and second"
    known = _principal_names(function)
    parents = {child: parent for parent in ast.walk(function) for child in ast.iter_child_nodes(parent)}
    for statement in statements:
        if not any(_mentions(argument, known) for argument in _where_arguments(statement, parents)):
            yield statement.lineno, "the WHERE clause does not name the principal"


def _imported_tables(tree: ast.Module) -> set[str]:
    return {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("claude_wrapper.storage.tables")
        for alias in node.names
    }


def _outermost_functions(node: ast.AST) -> Iterator[Function]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            yield child
        else:
            yield from _outermost_functions(child)


def _statements(function: Function, tables: set[str]) -> Iterator[ast.Call]:
    for node in ast.walk(function):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if (isinstance(called, ast.Name) and called.id in _VERBS) or (
            isinstance(called, ast.Attribute)
            and called.attr in _VERBS
            and isinstance(called.value, ast.Name)
            and called.value.id in {"sa", "sqlalchemy", *tables}
        ):
            yield node


def _where_arguments(statement: ast.AST, parents: dict[ast.AST, ast.AST]) -> Iterator[ast.expr]:
    """The arguments of every `.where(…)` chained onto the statement."""
    node = statement
    while isinstance(attribute := parents.get(node), ast.Attribute) and isinstance(
        call := parents.get(attribute), ast.Call
    ):
        if attribute.attr in {"where", "filter"}:
            yield from call.args
        node = call


def _principal_names(function: Function) -> set[str]:
    """`principal` and the local names whose value was made from it."""
    known = {"principal"}
    for _ in range(3):
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and _mentions(node.value, known):
                targets = [name for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
                known |= {name.id for name in targets}
    return known


def _mentions(node: ast.AST, names: set[str]) -> bool:
    return any(isinstance(part, ast.Name) and part.id in names for part in ast.walk(node))


def _escaped(function: Function, lines: list[str]) -> bool:
    first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
    return first >= 2 and bool(_ESCAPE.search(lines[first - 2]))


def problems_of_project(root: Path) -> list[str]:
    """What is wrong in all packages that keep tenant data."""
    found: list[str] = []
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            found += problems(path.read_text(), str(path.relative_to(root)))
    return found
