"""No output and no byte depends on the order of a set (which is another in each process) or of a folder's listing."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "functional_lm"
ORDERLESS = {"sorted", "set", "frozenset", "any", "all", "sum", "min", "max", "len"}
ORDERED = {"list", "tuple", "enumerate", "zip", "map", "filter", "next", "iter", "reversed", "dict", "join", "fromkeys"}
LISTINGS = {"glob", "rglob", "iterdir", "listdir", "scandir"}


def name(call: ast.AST) -> str:
    """What a call calls, without what it belongs to; "" of anything else."""
    called = call.func if isinstance(call, ast.Call) else None
    return getattr(called, "attr", None) or getattr(called, "id", None) or ""


def orderless(node: ast.AST) -> bool:
    """Whether an expression can be seen to be a set or a listing."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Sub, ast.BitAnd, ast.BitOr, ast.BitXor)):
        return any(orderless(side) or name(side) == "keys" for side in (node.left, node.right))
    if isinstance(node, (ast.Set, ast.SetComp)):
        return True
    return name(node) in {"set", "frozenset"} | LISTINGS


def walks(source: str) -> Iterator[tuple[int, str]]:
    """(line, expression) of everything that is gone through in no order of its own, where that order can show."""
    whole = ast.parse(source)
    inside = {id(part): call for call in ast.walk(whole) if isinstance(call, ast.Call) for part in call.args}
    for node in ast.walk(whole):
        gone: list[ast.expr] = []
        if isinstance(node, ast.For):
            gone = [node.iter]
        elif isinstance(node, (ast.ListComp, ast.GeneratorExp, ast.DictComp)):
            gone = [] if name(inside.get(id(node), node)) in ORDERLESS else [part.iter for part in node.generators]
        elif name(node) in ORDERED and isinstance(node, ast.Call):
            outer = name(inside.get(id(node), node))
            gone = [] if outer in ORDERLESS else node.args
        elif isinstance(node, ast.Starred):
            gone = [node.value]
        yield from ((part.lineno, ast.unparse(part)) for part in gone if orderless(part))


def test_nothing_is_gone_through_in_an_order_of_chance() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {what}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, what in walks(path.read_text("utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "for a in b.keys() - c: pass",
        "for a in set(b): pass",
        "x = [a for a in {1, 2}]",
        "x = ','.join({str(a) for a in b})",
        "for path in folder.glob('*'): pass",
        "x = next(folder.iterdir())",
        "x = list(os.listdir(p))",
        "f(*(a | set(b)))",
    ],
)
def test_the_walk_catches(source: str) -> None:
    assert len(list(walks(source))) == 1


@pytest.mark.parametrize(
    "source",
    ["for a in sorted(b.keys() - c): pass", "x = any(p.iterdir())", "x = all(p for p in q.glob('*'))", "x = a in {1}"],
)
def test_the_walk_leaves_alone(source: str) -> None:
    assert not list(walks(source))
