"""Mutation score of registry/: how many small faults in the evaluators' functions the tests notice.

    python benchmarks/mutation.py                       # every module, a sample of mutants of each
    python benchmarks/mutation.py --modules ranks stability --mutants 40
    python benchmarks/mutation.py --methods             # of the evaluators' methods in place of functions
    python benchmarks/mutation.py --write               # and the table in docs/testing.md
    python benchmarks/mutation.py --store FOLDER        # a second call goes on where the first stopped

A mutant is one function with one small fault (`mutants_of`). It runs in a fork of a process that has
imported everything and collected the tests: the fault is put into the function's `__code__`, so that
every module uses it, and the tests that call the function run until one fails. Which tests call which
function is found by a run of all tests beforehand. mutmut and cosmic-ray were considered: the first
needs the package in a folder of its name (`package-dir` is "." here), the second starts a process for
each mutant, and importing sae_lens takes twelve seconds.

With `--store` each outcome is written as it comes. A mutant is not run again where its module is the
same and the test that failed still exists; or no test failed, and the tests of the function are the same
or the mutant is listed as equivalent.

Mutants that cannot change any result are listed in equivalent_mutants.yaml, each with its reason.
"""

from __future__ import annotations

import argparse
import ast
import copy
import functools
import gc
import hashlib
import json
import mmap
import os
import random
import resource
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import hypothesis
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "taxolens"
FOLDERS = ("registry/evaluators", "registry/evaluators/parts")
TESTS = "tests/registry"
DOCS = ROOT / "docs" / "testing.md"
EQUIVALENT = Path(__file__).with_name("equivalent_mutants.yaml")
MARKS = ("<!-- mutation score: begin -->", "<!-- mutation score: end -->")
LEFT_OUT = {"figure", "histograms", "figures", "_draw_by_size", "_draw_tree", "notes"}
LEFT_OUT |= {"read_embeddings", "__post_init__", "__repr__"}
"""Functions that draw, write sentences, read files or check options: not mutated."""
KILLED = ("failed", "timeout", "crash")
"""Outcomes that a run of the tests shows: a test fails, takes too long, or ends the process."""
MEMORY = 6 * 2**30
"""Bytes that a mutant may ask for beyond what the process has."""

COMPARE = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
ARITHMETIC = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
NAMES = {"min": "max", "argmin": "argmax", "any": "all", "minimum": "maximum", "zeros": "ones"}
NAMES |= {other: name for name, other in NAMES.items()}


@dataclass(frozen=True)
class Mutant:
    """One fault in one function."""

    module: str  # path below registry/evaluators
    function: str  # qualified name
    change: str  # "before -> after"
    line: int
    digest: str  # of the module
    compiled: Callable[[], CodeType | None]
    """The code of the function with the fault in it; None where it does not compile."""
    recorded: Callable[[], CodeType | None]
    """The code of the function without it, which calls `sys.taxolens_called(module, function)`."""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.module, self.function, self.change


# Faults ------------------------------------------------------------------------------------------


def faults(node: ast.AST) -> Iterator[ast.AST | None]:
    """What may stand in place of a node; None: nothing, the statement is dropped."""
    match node:
        case ast.Compare(left, ops, comparators):
            for i, op in enumerate(ops):
                for other in COMPARE[type(op)]:
                    yield ast.Compare(left, [*ops[:i], other(), *ops[i + 1 :]], comparators)
        case ast.BinOp(left, op, right) if type(op) in ARITHMETIC:
            yield ast.BinOp(left, ARITHMETIC[type(op)](), right)
        case ast.AugAssign(target, op, value):
            if type(op) in ARITHMETIC:
                yield ast.AugAssign(target, ARITHMETIC[type(op)](), value)
            yield None
        case ast.UnaryOp(_, operand):
            yield operand
        case ast.BoolOp(op, values):
            yield ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values)
        case ast.Constant(bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(int(value) | float(value)):
            yield ast.Constant(value + 1)
            yield ast.Constant(value - 1)
        case ast.If(test, body, orelse):
            yield ast.If(ast.UnaryOp(ast.Not(), test), body, orelse)
        case ast.IfExp(test, body, orelse):
            yield ast.IfExp(test, orelse, body)
        case ast.comprehension(target, iterator, [_, *rest], is_async):
            yield ast.comprehension(target, iterator, rest, is_async)
        case ast.Return(ast.expr() as value) if ast.unparse(value) != "None":
            yield ast.Return(ast.Constant(None))
        case ast.Expr(ast.Call()) | ast.Assign([ast.Subscript() | ast.Attribute()]):
            yield None
        case ast.Continue():
            yield ast.Break()
        case ast.Attribute(value, name, context) if name in NAMES:
            yield ast.Attribute(value, NAMES[name], context)
        case ast.Call(function, args, keywords):
            for i in range(len(keywords)):
                yield ast.Call(function, args, keywords[:i] + keywords[i + 1 :])
            if len(args) > 1:
                yield ast.Call(function, args[:-1], keywords)
            if isinstance(function, ast.Name) and function.id in NAMES:
                yield ast.Call(ast.Name(NAMES[function.id], ast.Load()), args, keywords)
        case ast.Slice(lower, upper, step) if step is not None:
            yield ast.Slice(lower, upper)


def places(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """Every node below a function: (its parent, the field, the place in the field, the node), but
    for types, checks of types, errors and what is logged."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "args") and not isinstance(
            node, ast.Call
        ):
            continue
        for i, child in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(child, ast.AST) or isinstance(child, ast.Raise | ast.Assert):
                continue
            if isinstance(child, ast.Expr) and "logger" in ast.unparse(child):
                continue
            yield node, field, i if isinstance(value, list) else None, child
            yield from places(child)


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef, bool]]:
    """Functions and methods of a module: qualified name, node, whether it is a method of an
    evaluator."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            evaluator = any("Evaluator" in ast.unparse(base) for base in node.bases)
            for name, function, _ in functions(node, f"{prefix}{node.name}."):
                yield name, function, evaluator
        elif isinstance(node, ast.FunctionDef) and node.name not in LEFT_OUT:
            yield prefix + node.name, node, False


def mutants_of(source: str, module: str, methods: bool = False) -> list[Mutant]:
    """All mutants of a module's functions, or of the methods of its evaluators."""
    found, digest = [], _digest(source)
    for top in ast.parse(source).body:
        for name, function, of_evaluator in functions(ast.Module([top], [])):
            if of_evaluator != methods:
                continue
            call = ast.parse(f"__import__('sys').taxolens_called({module!r}, {name!r})").body[0]
            body = [call, *function.body]
            record = functools.partial(_compiled, top, name, function, "body", None, body)
            seen: Counter[str] = Counter()
            for parent, field, place, node in places(function):
                for fault in faults(node):
                    change = f"{_shown(node)} -> {'pass' if fault is None else _shown(fault)}"
                    seen[change] += 1
                    if seen[change] > 1:
                        change += f" #{seen[change]}"
                    fault = ast.Pass() if fault is None else fault
                    build = functools.partial(_compiled, top, name, parent, field, place, fault)
                    line = getattr(node, "lineno", getattr(parent, "lineno", function.lineno))
                    found.append(Mutant(module, name, change, line, digest, build, record))
    return found


def _shown(node: ast.AST) -> str:
    if isinstance(node, ast.comprehension):
        return " ".join(f"if {ast.unparse(test)}" for test in node.ifs) or "no if"
    if isinstance(node, ast.If):
        return f"if {ast.unparse(node.test)}"
    return " ".join(ast.unparse(ast.fix_missing_locations(copy.deepcopy(node))).split())


def _compiled(
    top: ast.stmt,
    name: str,
    parent: ast.AST,
    field: str,
    place: int | None,
    fault: ast.AST | list[ast.stmt],
) -> CodeType | None:
    before = getattr(parent, field)
    after = fault if place is None else [*before[:place], fault, *before[place + 1 :]]
    setattr(parent, field, after)
    mutated = copy.deepcopy(top)
    setattr(parent, field, before)
    future = ast.ImportFrom("__future__", [ast.alias("annotations")], 0)
    module = ast.fix_missing_locations(ast.Module([future, mutated], []))
    try:
        code = compile(module, "<mutant>", "exec")
    except (SyntaxError, ValueError, TypeError):
        return None
    for part in name.split("."):
        code = next(c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == part)
    return code


def function_of(module: str, name: str) -> FunctionType:
    """The function of a qualified name below its decorators."""
    found: Any = sys.modules[_dotted(module)]
    for part in name.split("."):
        found = vars(found)[part]
    while not isinstance(found, FunctionType) or hasattr(found, "__wrapped__"):
        inner = ("__wrapped__", "fget", "func", "__func__")
        found = next(getattr(found, name) for name in inner if hasattr(found, name))
    return found


def _dotted(module: str) -> str:
    return f"{PACKAGE}.{FOLDERS[0]}/{module}".removesuffix(".py").replace("/", ".")


# Running -----------------------------------------------------------------------------------------


@dataclass
class Calls:
    """What a run without a fault shows about one file of tests."""

    digest: str  # of the file
    tests: dict[str, list[tuple[str, str]]]  # test -> functions (module, name) that it calls
    seconds: dict[str, float]
    broken: list[str]  # tests that fail


class Store:
    """Outcomes and calls of earlier runs, in a folder; None: nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.calls: dict[str, Calls] = {}
        self.outcomes: dict[tuple[str, str, str], dict[str, Any]] = {}
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "calls.json").exists():
            found = json.loads((folder / "calls.json").read_text())
            self.calls = {path: Calls(**calls) for path, calls in found.items()}
        if (folder / "outcomes.jsonl").exists():
            for line in (folder / "outcomes.jsonl").read_text().splitlines():
                entry = json.loads(line)
                self.outcomes[entry["module"], entry["function"], entry["change"]] = entry

    def keep_calls(self) -> None:
        if self.folder is not None:
            text = json.dumps({path: vars(calls) for path, calls in self.calls.items()})
            (self.folder / "calls.json").write_text(text)

    def keep(self, mutant: Mutant, **entry: Any) -> None:
        module, function, change = mutant.key
        entry = {"module": module, "function": function, "change": change, **entry}
        self.outcomes[mutant.key] = entry
        if self.folder is not None:
            with (self.folder / "outcomes.jsonl").open("a") as file:
                file.write(json.dumps(entry) + "\n")


@dataclass
class Child:
    """A process that runs tests over one mutant."""

    mutant: Mutant
    items: Sequence[pytest.Item]
    place: mmap.mmap  # the place in `items` of the test that runs
    facts: dict[str, str]
    started: float


class Session:
    """A pytest plugin: in place of running the tests once it runs them for each mutant."""

    def __init__(
        self,
        mutants: Sequence[Mutant],
        every: Sequence[Mutant],
        jobs: int,
        most: float,
        store: Store,
        equivalent: Iterable[tuple[str, str, str]],
    ) -> None:
        """`every`: mutants of all functions, for the run without a fault; `most`: seconds of tests
        over one mutant."""
        self.mutants, self.every, self.jobs, self.most = mutants, every, jobs, most
        self.store, self.equivalent = store, frozenset(equivalent)
        self.outcomes: dict[tuple[str, str, str], str] = {}
        self._failed = False
        self._called: set[tuple[str, str]] = set()
        self._by_fixture: defaultdict[str, set[tuple[str, str]]] = defaultdict(set)
        self._killers: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._failed |= report.failed

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        """A fixture is made once for many tests: all of them depend on what it calls."""
        outer, self._called = self._called, set()
        try:
            return (yield)
        finally:
            self._by_fixture[fixturedef.argname] |= self._called
            self._called |= outer

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:
            raise SystemExit("a test module cannot be imported")
        gc.collect()
        gc.freeze()  # a collection in a fork would copy every page
        items = session.items
        callers, seconds = self._callers(items)
        names = {item.nodeid for item in items}
        running: dict[int, Child] = {}
        for n, mutant in enumerate(self.mutants):
            calling = [i for i in items if i.nodeid in callers[mutant.module, mutant.function]]
            chosen = _nearest(calling, seconds, mutant, self.most, self._killers)
            facts = self._facts(mutant, chosen)
            if not chosen:
                self._ended(mutant, outcome="no test", **facts)
                continue
            if self._known(mutant, facts, names):
                continue
            while len(running) >= self.jobs:
                self._wait(running)
            place = mmap.mmap(-1, 4)
            pid = os.fork()
            if not pid:
                self._child(mutant, chosen, seconds, place)
            running[pid] = Child(mutant, chosen, place, facts, time.monotonic())
            print(f"\r{n + 1} of {len(self.mutants)} mutants", end="", file=sys.stderr, flush=True)
        while running:
            self._wait(running)
        print(file=sys.stderr)
        return True

    def _facts(self, mutant: Mutant, chosen: Sequence[pytest.Item]) -> dict[str, str]:
        """Digests of all that an outcome depends on: the module, and the tests that run."""
        tests = [f"{i.nodeid} {self.store.calls[_file(i)].digest}" for i in chosen]
        return {"source": mutant.digest, "tests": _digest("\n".join(sorted(tests)))}

    def _known(self, mutant: Mutant, facts: dict[str, str], names: set[str]) -> bool:
        """Take the outcome of an earlier run where it holds."""
        entry = self.store.outcomes.get(mutant.key)
        if entry is None or entry["source"] != facts["source"]:
            return False
        killed = entry["outcome"] in KILLED and entry["test"] in names
        same = entry["tests"] == facts["tests"] or mutant.key in self.equivalent
        if not killed and not same:
            return False
        self._ended(mutant, **entry)
        return True

    def _ended(self, mutant: Mutant, outcome: str, **entry: Any) -> None:
        self.outcomes[mutant.key] = outcome
        if outcome in KILLED:
            self._killers[mutant.module][entry["test"]] += 1
            self._killers[f"{mutant.module}:{mutant.function}"][entry["test"]] += 1

    def _wait(self, running: dict[int, Child]) -> None:
        pid, status = os.wait()
        child = running.pop(pid)
        if os.WIFSIGNALED(status):
            limits = (signal.SIGPROF, signal.SIGALRM)
            outcome = "timeout" if os.WTERMSIG(status) in limits else "crash"
        else:
            outcome = {0: "survived", 1: "failed"}.get(os.WEXITSTATUS(status), "not built")
        test = child.items[int.from_bytes(child.place[:], "little")].nodeid
        child.place.close()
        entry = {
            "outcome": outcome,
            "test": test if outcome in KILLED else "",
            "seconds": round(time.monotonic() - child.started, 2),
            **child.facts,
        }
        self.store.keep(child.mutant, line=child.mutant.line, **entry)
        self._ended(child.mutant, **entry)

    def _child(
        self,
        mutant: Mutant,
        items: Sequence[pytest.Item],
        seconds: dict[str, float],
        place: mmap.mmap,
    ) -> None:
        """Run tests over one mutant until one fails; ends the process."""
        try:
            _quiet()
            code = mutant.compiled()
            assert code is not None
            function_of(mutant.module, mutant.function).__code__ = code
        except BaseException:
            os._exit(2)
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * resource.getpagesize() + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            for limit in (signal.SIGPROF, signal.SIGALRM):
                signal.signal(limit, signal.SIG_DFL)
            for n, (item, following) in enumerate(zip(items, [*items[1:], None])):
                place[:] = n.to_bytes(4, "little")
                usual = seconds[item.nodeid]
                signal.setitimer(signal.ITIMER_PROF, 10 + 5 * usual)  # of processor time
                signal.alarm(60 + int(20 * usual))  # for what waits
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                if self._failed:
                    os._exit(1)
        except BaseException:
            os._exit(1)
        os._exit(0)

    def _callers(
        self, items: Sequence[pytest.Item]
    ) -> tuple[dict[tuple[str, str], set[str]], dict[str, float]]:
        """Function -> the tests that call it, and test -> its seconds, from a run without a fault."""
        functions = {(m.module, m.function): m for m in self.every}
        names = _digest("\n".join(" ".join(key) for key in sorted(functions)))
        files: defaultdict[str, list[pytest.Item]] = defaultdict(list)
        for item in items:
            files[_file(item)].append(item)
        digests = {path: _digest(names + Path(path).read_text()) for path in files}
        for path, digest in digests.items():
            if path not in self.store.calls or self.store.calls[path].digest != digest:
                self.store.calls[path] = Calls(digest, *self._recorded(files[path], functions))
                self.store.keep_calls()
        callers: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
        seconds: dict[str, float] = {}
        for path in files:
            calls = self.store.calls[path]
            seconds |= calls.seconds
            for test, called in calls.tests.items():
                for module, name in called:
                    callers[module, name].add(test)
            if calls.broken:
                print("left out, as they fail without a mutant:", *calls.broken, file=sys.stderr)
        return callers, seconds

    def _recorded(
        self, items: Sequence[pytest.Item], functions: dict[tuple[str, str], Mutant]
    ) -> tuple[dict[str, list[tuple[str, str]]], dict[str, float], list[str]]:
        """Test -> functions called, test -> seconds, and the tests that fail; in a fork."""
        reader, writer = os.pipe()
        if not os.fork():
            os.close(reader)
            _quiet()
            sys.taxolens_called = lambda *name: self._called.add(name)  # pyright: ignore
            for name, mutant in functions.items():
                function_of(*name).__code__ = mutant.recorded()  # pyright: ignore
            with os.fdopen(writer, "w") as pipe:
                json.dump(self._run(items), pipe)
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            found = json.load(pipe)
        os.wait()
        return found

    def _run(
        self, items: Sequence[pytest.Item]
    ) -> tuple[dict[str, list[tuple[str, str]]], dict[str, float], list[str]]:
        calls: dict[str, set[tuple[str, str]]] = {}
        seconds, broken = {}, []
        for item, following in zip(items, [*items[1:], None]):
            self._called = set()
            started = time.monotonic()
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            seconds[item.nodeid] = round(time.monotonic() - started, 3)
            if self._failed:
                broken.append(item.nodeid)
            else:
                calls[item.nodeid] = self._called
            self._failed = False
        for item in items:
            for name in getattr(item, "fixturenames", ()):
                calls.get(item.nodeid, set()).update(self._by_fixture[name])
        return {test: sorted(names) for test, names in calls.items()}, seconds, broken


def _file(item: pytest.Item) -> str:
    return str(item.path.relative_to(ROOT))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _nearest(
    items: Sequence[pytest.Item],
    seconds: dict[str, float],
    mutant: Mutant,
    most: float,
    killers: dict[str, Counter[str]],
) -> list[pytest.Item]:
    """The tests of the files that import from the module, then those of the files that take least,
    of each file the quick ones first, up to `most` seconds.

    Those that failed for other mutants of the function or the module go first.
    """
    importing = f"{_dotted(mutant.module)} import "
    home = {item.path: importing in item.path.read_text() for item in items}
    cost: Counter[Path] = Counter()
    for item in items:
        cost[item.path] += seconds[item.nodeid]  # pyright: ignore[reportArgumentType]
    order = {i.nodeid: (not home[i.path], cost[i.path], seconds[i.nodeid]) for i in items}
    total, chosen = 0.0, []
    for item in sorted(items, key=lambda i: order[i.nodeid]):
        total += seconds[item.nodeid]
        if chosen and total > most:
            break
        chosen.append(item)
    best = [test for test, _ in killers[f"{mutant.module}:{mutant.function}"].most_common(3)]
    best += [test for test, _ in killers[mutant.module].most_common(2) if test not in best]
    place = {test: n for n, test in enumerate(best)}
    return sorted(chosen, key=lambda i: place.get(i.nodeid, len(place)))


def _quiet() -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)


# Results -----------------------------------------------------------------------------------------


def scores(
    counts: dict[str, int], outcomes: dict[tuple[str, str, str], str], equivalent: dict[Any, str]
) -> dict[str, dict[str, int]]:
    """module -> how many mutants it has, were tried, died, cannot be noticed, and lived."""
    found = {}
    for module in sorted(counts):
        own = {key: o for key, o in outcomes.items() if key[0] == module and o != "not built"}
        lived = [key for key, outcome in own.items() if outcome not in KILLED]
        same = [key for key in lived if key in equivalent]
        found[module] = {
            "mutants": counts[module],
            "tried": len(own),
            "died": len(own) - len(lived),
            "equivalent": len(same),
            "lived": len(lived) - len(same),
        }
    return found


def table(found: dict[str, dict[str, int]]) -> str:
    """The scores as Markdown; the share is of the mutants tried that are not equivalent."""
    total = {name: sum(row[name] for row in found.values()) for name in next(iter(found.values()))}
    lines = [
        "| module | mutants | tried | died | equivalent | lived | score |",
        "| --- |" + " ---: |" * 6,
    ]
    for module, row in {**found, "**all**": total}.items():
        fair = row["tried"] - row["equivalent"]
        share = f"{row['died'] / fair:.0%}" if fair else ""
        lines.append(f"| {module} | " + " | ".join(map(str, row.values())) + f" | {share} |")
    return "\n".join(lines)


def write_docs(text: str) -> None:
    """Put `text` between the marks in docs/testing.md."""
    page = DOCS.read_text()
    before, rest = page.split(MARKS[0])
    DOCS.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{rest.split(MARKS[1])[1]}")


def _run(session: Session) -> dict[tuple[str, str, str], str]:
    """Outcome of each mutant of a session."""
    hypothesis.settings.register_profile(
        "mutation",
        derandomize=True,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    hypothesis.settings.load_profile("mutation")
    files = [str(p) for p in sorted(Path(TESTS).glob("test_*.py")) if "evaluators" in p.read_text()]
    pytest.main(["-q", "-s", "-p", "no:cacheprovider", *files], plugins=[session])
    return session.outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modules", nargs="*", help="names such as ranks or stability")
    parser.add_argument("--methods", action="store_true", help="of the evaluators, not functions")
    parser.add_argument("--mutants", type=int, default=20, help="of each module, at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60, help="of tests run over one mutant")
    parser.add_argument("--store", type=Path, help="folder that keeps outcomes as they come")
    parser.add_argument("--stored", action="store_true", help="run nothing: what the store holds")
    parser.add_argument("--out", type=Path, help="JSON of the scores and of what lived")
    parser.add_argument("--write", action="store_true", help="the table into docs/testing.md")
    args = parser.parse_args()
    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"  # a fork of a process with threads may hang

    counts, chosen, every = {}, [], []
    for path in sorted(p for folder in FOLDERS for p in Path(folder).glob("*.py")):
        module = str(path.relative_to(FOLDERS[0]))
        if path.stem == "base":
            continue  # it runs the evaluators: it is tested with plugin/
        mutants = mutants_of(path.read_text(), module, args.methods)
        every += mutants
        if args.modules and path.stem not in args.modules:
            continue
        random.Random(f"{args.seed} {module}").shuffle(mutants)
        if mutants:
            counts[module] = len(mutants)
            chosen += [m for m in mutants if m.compiled() is not None][: args.mutants]

    listed = yaml.safe_load(EQUIVALENT.read_text()) or []
    equivalent = {(e["module"], e["function"], e["change"]): e["reason"] for e in listed}
    store = Store(args.store)
    if args.stored:
        entries = {mutant.key: store.outcomes.get(mutant.key) for mutant in chosen}
        same = {m.key for m in chosen if (entries[m.key] or {}).get("source") == m.digest}
        outcomes = {
            key: entry["outcome"] for key, entry in entries.items() if entry and key in same
        }
    else:
        session = Session(chosen, every, args.jobs, args.seconds, store, equivalent)
        outcomes = _run(session)
    found = scores(counts, outcomes, equivalent)
    print(table(found))
    lived = [k for k, o in outcomes.items() if o not in (*KILLED, "not built")]
    lines = {mutant.key: mutant.line for mutant in chosen}
    for key in sorted(set(lived) - set(equivalent)):
        print("lived:", f"{key[0]}:{lines[key]}", *key[1:], f"({outcomes[key]})", sep="  ")
    if args.out:
        result = {
            "seed": args.seed,
            "modules": found,
            "outcomes": Counter(outcomes.values()),
        }
        args.out.write_text(json.dumps({**result, "lived": sorted(map(list, lived))}, indent=1))
    if args.write:
        write_docs(table(found))


if __name__ == "__main__":
    main()
