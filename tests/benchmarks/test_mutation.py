"""The faults that the mutation script makes, and how it counts what became of them."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import mutation
import pytest
from mutation import Mutant, Session, Store, function_of, mutants_of, scores, table, write_docs

SOURCE = '''
from functools import cached_property, wraps


def decorated(function):
    @wraps(function)
    def kept(*args):
        return function(*args)
    return kept


@decorated
def shared(n: int, *, deep: bool = False) -> int:
    """Not mutated: this, the types and the default."""
    assert n is not None
    if n < 0:
        raise ValueError(f"below 0 by {-n}")
    total = 0
    for i in [i for i in range(n) if i != 2]:
        total += max(i, 1)
    return total


class Part:
    @cached_property
    def value(self):
        return super().__init__() is None and 3 * 2


class Thing(Evaluator[None]):
    def compute(self):
        return {"a": 1.0}

    def figures(self):
        return {"not mutated": 1 + 1}
'''


def load(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("taxolens.registry.evaluators.parts.example")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    tree = ast.parse(SOURCE)
    tree.body = [node for node in tree.body if getattr(node, "name", "") != "Thing"]
    exec(compile(tree, "example", "exec"), vars(module))
    return module


def changes(**options: Any) -> dict[tuple[str, str], Mutant]:
    return {(m.function, m.change): m for m in mutants_of(SOURCE, "parts/example.py", **options)}


def test_every_kind_of_fault_has_its_place() -> None:
    found = {change for function, change in changes() if function == "shared"}
    assert found == {
        "n < 0 -> n <= 0",
        "n < 0 -> n >= 0",
        "if n < 0 -> if not n < 0",
        "0 -> 1",
        "0 -> -1",
        "0 -> 1 #2",
        "0 -> -1 #2",
        "if i != 2 -> no if",
        "i != 2 -> i == 2",
        "2 -> 3",
        "2 -> 1",
        "total += max(i, 1) -> pass",
        "total += max(i, 1) -> total -= max(i, 1)",
        "max(i, 1) -> max(i)",
        "max(i, 1) -> min(i, 1)",
        "1 -> 2",
        "1 -> 0",
        "return total -> return None",
    }
    assert ("Part.value", "3 * 2 -> 3 / 2") in changes()
    assert {function for function, _ in changes(methods=True)} == {"Thing.compute"}


def test_a_fault_is_put_below_every_decorator(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load(monkeypatch)
    imported = module.shared  # as another module holds it
    assert imported(5) == 1 + 1 + 3 + 4
    mutants = changes()
    for change, expected in {
        "total += max(i, 1) -> total -= max(i, 1)": -9,
        "if i != 2 -> no if": 11,
        "i != 2 -> i == 2": 2,
        "return total -> return None": None,
    }.items():
        mutant = mutants["shared", change]
        code = mutant.compiled()
        assert code is not None
        function_of(mutant.module, mutant.function).__code__ = code
        assert imported(5) == expected, change
    code = mutants["Part.value", "3 * 2 -> 3 / 2"].compiled()
    assert code is not None
    function_of("parts/example.py", "Part.value").__code__ = code
    assert module.Part().value == 1.5


def test_calls_are_recorded_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    module, called = load(monkeypatch), set()
    monkeypatch.setattr(sys, "taxolens_called", lambda *name: called.add(name), raising=False)
    code = changes()["shared", "1 -> 2"].recorded()
    assert code is not None
    function_of("parts/example.py", "shared").__code__ = code
    assert module.Part().value == 6 and not called
    assert module.shared(5) == 9 and called == {("parts/example.py", "shared")}


def test_an_outcome_is_kept_until_what_it_depends_on_changes(tmp_path: Path) -> None:
    killed, lived = changes()["shared", "0 -> 1"], changes()["shared", "0 -> -1"]
    facts = {"source": killed.digest, "tests": "some"}
    Store(tmp_path).keep(killed, outcome="failed", test="t.py::a", **facts)
    Store(tmp_path).keep(lived, outcome="survived", test="", **facts)

    def known(mutant: Mutant, listed: tuple[Any, ...] = (), **changed: str) -> bool:
        session = Session([], [], 1, 9.0, Store(tmp_path), listed)
        found = session._known(mutant, {**facts, **changed}, {"t.py::a"})
        assert session.outcomes.keys() == ({mutant.key} if found else set())
        return found

    assert known(killed) and known(lived)
    assert known(killed, tests="more") and not known(lived, tests="more")
    assert known(lived, (lived.key,), tests="more")  # what cannot be noticed
    assert not known(killed, source="other") and not known(lived, (lived.key,), source="other")
    Store(tmp_path).keep(killed, outcome="failed", test="t.py::b", **facts)
    assert not known(killed, tests="more")  # the test is gone


def test_scores_leave_out_what_cannot_be_noticed(tmp_path: Any, monkeypatch: Any) -> None:
    keys = [("a.py", "f", str(i)) for i in range(4)] + [("b.py", "g", "x"), ("b.py", "g", "y")]
    outcomes = dict(zip(keys, ("failed", "timeout", "survived", "no test", "crash", "not built")))
    equivalent = {keys[2]: "a reason", keys[0]: "listed, but noticed all the same"}
    found = scores({"a.py": 9, "b.py": 1}, outcomes, equivalent)
    assert found["a.py"] == {"mutants": 9, "tried": 4, "died": 2, "equivalent": 1, "lived": 1}
    assert found["b.py"]["died"] == found["b.py"]["tried"] == 1
    lines = table(found).splitlines()
    assert lines[2] == "| a.py | 9 | 4 | 2 | 1 | 1 | 67% |"
    assert lines[4] == "| **all** | 10 | 5 | 3 | 1 | 1 | 75% |"

    monkeypatch.setattr(mutation, "DOCS", tmp_path / "testing.md")
    mutation.DOCS.write_text(f"before\n{mutation.MARKS[0]}\nold\n{mutation.MARKS[1]}\nafter\n")
    write_docs("new")
    assert mutation.DOCS.read_text().splitlines() == [
        "before",
        mutation.MARKS[0],
        "new",
        mutation.MARKS[1],
        "after",
    ]
