"""Mutation score of registry/: how many small faults in the evaluators' functions the tests notice.

    python benchmarks/mutation.py                       # every module, a sample of mutants of each
    python benchmarks/mutation.py --modules ranks stability --mutants 40
    python benchmarks/mutation.py --methods             # of the evaluators' methods in place of functions
    python benchmarks/mutation.py --write               # and the table in docs/testing.md

A mutant is one function with one small fault (`mutants_of`). It runs in a fork of a process that has
imported everything and collected the tests: the fault is put into the function's `__code__`, so that
every module sees it, and the tests that call the function run until one fails. Which tests call which
function is found by a run of all tests beforehand. mutmut and cosmic-ray were considered: the first
needs the package in a folder of its name (`package-dir` is "." here), the second starts a process for
each mutant, and importing sae_lens takes twelve seconds.

Mutants that cannot change any result are listed in equivalent_mutants.yaml, each with its reason.
"""

from __future__ import annotations

import argparse
import ast
import copy
import functools
import json
import os
import random
import resource
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
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
MOST_SECONDS = 60.0
"""Of the tests that call a function those run, the nearest first, that took so long together."""
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
    compiled: Callable[[], CodeType | None]
    """The code of the function with the fault in it; None where it does not compile."""

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
    found = []
    for top in ast.parse(source).body:
        for name, function, of_evaluator in functions(ast.Module([top], [])):
            if of_evaluator != methods:
                continue
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
                    found.append(Mutant(module, name, change, line, build))
    return found


def _shown(node: ast.AST) -> str:
    if isinstance(node, ast.comprehension):
        return " ".join(f"if {ast.unparse(test)}" for test in node.ifs) or "no if"
    if isinstance(node, ast.If):
        return f"if {ast.unparse(node.test)}"
    return " ".join(ast.unparse(ast.fix_missing_locations(copy.deepcopy(node))).split())


def _compiled(
    top: ast.stmt, name: str, parent: ast.AST, field: str, place: int | None, fault: ast.AST
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


class Session:
    """A pytest plugin: in place of running the tests once it runs them for each mutant."""

    def __init__(self, mutants: Sequence[Mutant], jobs: int) -> None:
        self.mutants, self.jobs = mutants, jobs
        self.outcomes: dict[tuple[str, str, str], str] = {}
        self._failed = False
        self._called: set[tuple[str, str]] = set()
        self._by_fixture: defaultdict[str, set[tuple[str, str]]] = defaultdict(set)

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
        items = session.items
        callers, seconds = self._callers(items)
        running: dict[int, Mutant] = {}
        for n, mutant in enumerate(self.mutants):
            names = callers.get((mutant.module, mutant.function), set())
            chosen = _nearest([i for i in items if i.nodeid in names], seconds, mutant)
            if not chosen:
                self.outcomes[mutant.key] = "no test"
                continue
            while len(running) >= self.jobs:
                self._wait(running)
            pid = os.fork()
            if not pid:
                self._child(mutant, chosen, 10 + 5 * sum(seconds[i.nodeid] for i in chosen))
            running[pid] = mutant
            print(f"\r{n + 1} of {len(self.mutants)} mutants", end="", file=sys.stderr, flush=True)
        while running:
            self._wait(running)
        print(file=sys.stderr)
        return True

    def _wait(self, running: dict[int, Mutant]) -> None:
        pid, status = os.wait()
        outcome = "failed" if status else "survived"
        if os.WIFSIGNALED(status):
            outcome = "timeout" if os.WTERMSIG(status) == signal.SIGALRM else "crash"
        self.outcomes[running.pop(pid).key] = outcome

    def _child(self, mutant: Mutant, items: Sequence[pytest.Item], limit: float) -> None:
        """Run tests over one mutant until one fails; ends the process."""
        try:
            _quiet()
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * resource.getpagesize() + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(int(limit))
            code = mutant.compiled()
            assert code is not None
            function_of(mutant.module, mutant.function).__code__ = code
            self._run(items)
        except BaseException:
            os._exit(1)
        os._exit(0)

    def _run(self, items: Sequence[pytest.Item]) -> None:
        for item, following in zip(items, [*items[1:], None]):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self._failed:
                os._exit(1)

    def _callers(
        self, items: Sequence[pytest.Item]
    ) -> tuple[dict[tuple[str, str], set[str]], dict[str, float]]:
        """Function -> the tests that call it, and test -> its seconds, from a run without a fault."""
        codes = {
            function_of(*name).__code__: name
            for name in {(m.module, m.function) for m in self.mutants}
        }
        reader, writer = os.pipe()
        if not os.fork():
            os.close(reader)
            _quiet()
            with os.fdopen(writer, "w") as pipe:
                json.dump(self._recorded(items, codes), pipe)
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            calls, seconds, broken = json.load(pipe)
        os.wait()
        if broken:
            print("left out, as they fail without a mutant:", *broken, sep="\n  ", file=sys.stderr)
        callers: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
        for test, called in calls.items():
            for module, name in called:
                callers[module, name].add(test)
        return callers, seconds

    def _recorded(
        self, items: Sequence[pytest.Item], codes: dict[CodeType, tuple[str, str]]
    ) -> tuple[dict[str, list[tuple[str, str]]], dict[str, float], list[str]]:
        """Test -> functions called, test -> seconds, and the tests that fail."""

        def record(frame: Any, event: str, _: Any) -> None:
            if event == "call" and frame.f_code in codes:
                self._called.add(codes[frame.f_code])

        calls: dict[str, set[tuple[str, str]]] = {}
        seconds, broken = {}, []
        for item, following in zip(items, [*items[1:], None]):
            self._called = set()
            started = time.monotonic()
            sys.setprofile(record)
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            sys.setprofile(None)
            seconds[item.nodeid] = time.monotonic() - started
            if self._failed:
                broken.append(item.nodeid)
            else:
                calls[item.nodeid] = self._called
            self._failed = False
        for item in items:
            for name in getattr(item, "fixturenames", ()):
                calls.get(item.nodeid, set()).update(self._by_fixture[name])
        return {test: sorted(names) for test, names in calls.items()}, seconds, broken


def _nearest(
    items: Sequence[pytest.Item], seconds: dict[str, float], mutant: Mutant
) -> list[pytest.Item]:
    """The tests of the module's own file, then the files that take least, up to `MOST_SECONDS`."""
    home = f"test_{Path(mutant.module).stem}.py"
    cost: Counter[Path] = Counter()
    for item in items:
        cost[item.path] += seconds[item.nodeid]  # pyright: ignore[reportArgumentType]
    ordered = sorted(items, key=lambda i: (i.path.name != home, cost[i.path], str(i.path)))
    total, chosen = 0.0, []
    for item in ordered:
        total += seconds[item.nodeid]
        if chosen and total > MOST_SECONDS:
            break
        chosen.append(item)
    return chosen


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
        own = {key: outcome for key, outcome in outcomes.items() if key[0] == module}
        lived = [key for key, outcome in own.items() if outcome in ("survived", "no test")]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modules", nargs="*", help="names such as ranks or stability")
    parser.add_argument("--methods", action="store_true", help="of the evaluators, not functions")
    parser.add_argument("--mutants", type=int, default=20, help="of each module, at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON of the scores and of what lived")
    parser.add_argument("--write", action="store_true", help="the table into docs/testing.md")
    args = parser.parse_args()
    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"  # a fork of a process with threads may hang

    counts, chosen = {}, []
    for path in sorted(p for folder in FOLDERS for p in Path(folder).glob("*.py")):
        module = str(path.relative_to(FOLDERS[0]))
        if path.stem == "base" or (args.modules and path.stem not in args.modules):
            continue  # base runs the evaluators: it is tested with plugin/
        mutants = mutants_of(path.read_text(), module, args.methods)
        random.Random(f"{args.seed} {module}").shuffle(mutants)
        if mutants:
            counts[module] = len(mutants)
            chosen += [m for m in mutants if m.compiled() is not None][: args.mutants]

    hypothesis.settings.register_profile(
        "mutation",
        derandomize=True,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    hypothesis.settings.load_profile("mutation")
    session = Session(chosen, args.jobs)
    files = [str(p) for p in sorted(Path(TESTS).glob("test_*.py")) if "evaluators" in p.read_text()]
    pytest.main(["-q", "-s", "-p", "no:cacheprovider", *files], plugins=[session])

    listed = yaml.safe_load(EQUIVALENT.read_text()) or []
    equivalent = {(e["module"], e["function"], e["change"]): e["reason"] for e in listed}
    found = scores(counts, session.outcomes, equivalent)
    print(table(found))
    lived = [k for k, o in session.outcomes.items() if o in ("survived", "no test")]
    lines = {mutant.key: mutant.line for mutant in chosen}
    for key in sorted(set(lived) - set(equivalent)):
        print("lived:", f"{key[0]}:{lines[key]}", *key[1:], f"({session.outcomes[key]})", sep="  ")
    if args.out:
        result = {
            "seed": args.seed,
            "modules": found,
            "outcomes": Counter(session.outcomes.values()),
        }
        args.out.write_text(json.dumps({**result, "lived": sorted(map(list, lived))}, indent=1))
    if args.write:
        write_docs(table(found))


if __name__ == "__main__":
    main()
