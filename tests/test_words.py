"""The words: docstrings of public definitions, shapes of arrays, and the one grammar of errors."""

import ast
import inspect
import re
from collections.abc import Iterator, Sequence
from functools import reduce
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from taxolens.registry import errors

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("plugin", "hooks", "registry")
SOURCES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for room in ROOMS
    for path in sorted((ROOT / room).rglob("*.py"))
}
Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = ast.ClassDef | Function

ERRORS = {name for name, error in vars(errors).items() if inspect.isclass(error)} - {
    "CorruptImageError"  # has arguments of its own: index, source and reason
}
CONFIG_ERRORS = {name for name in ERRORS if issubclass(getattr(errors, name), errors.ConfigError)}
# Functions and attributes whose result is a whole message of the grammar.
MESSAGES = {
    "unknown_name_message",
    "unknown",  # plugin/commands/shell.py
    "_unknown_key",  # plugin/study/settings.py
    "unknown_hook",  # hooks/models/points.py
    "failures",  # EvaluationContext: the error that an evaluator or accumulator raised before
}
# file: text of the call -> why it is built in another way
BUILT_OTHERWISE = {
    "plugin/reporting/results.py: DataError(str(error))": "MisfitError has the grammar",
    "registry/taxonomies/load.py: UnknownNameError(f'{error} Also allowed: {TREE_FILES}.')": (
        "the message of the table, which does not list files"
    ),
}
# ConfigErrors without `allowed`, by file and first argument -> why.
WITHOUT_ALLOWED = {
    "registry/taxonomies/taxonomy.py: 'taxonomy'": "unknown_name_message is a part of it",
}
# How a docstring states a shape: (n, m), (..., m), "scalar", or as that of the arguments.
SHAPE = re.compile(
    r"\((\w+ [-+] \w+|[^\s(),]+),[^()]*\)|scalar|\b(own|any|same|broadcast) shape", re.IGNORECASE
)
ARRAYS = ("Tensor", "ndarray", "csr_array")
# file: function -> why its docstring states no shape
NO_SHAPE: dict[str, str] = {}
# file: definition -> why it has no docstring
_MIXIN = "the mixin's base is SAE; TrainingSAE, which it is combined with, defines the method"
NO_DOCSTRING = {
    "registry/architectures/archetypal.py: ArchetypalDictionary.training_forward_pass": _MIXIN,
    "registry/architectures/archetypal.py: "
    "ArchetypalDictionary.process_state_dict_for_saving_inference": _MIXIN,
}


def is_public(name: str) -> bool:
    return not name.startswith("_")


def definitions(
    tree: ast.Module | Definition, above: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Definition]]:
    """(names, definition) of the classes and functions of a module, those in functions left out."""
    for node in tree.body:
        if isinstance(node, Definition):
            yield (*above, node.name), node
            if isinstance(node, ast.ClassDef):
                yield from definitions(node, (*above, node.name))


def undocumented(source: str, module: str | None = None) -> list[str]:
    """The public definitions without a docstring.

    A method that overrides another has its docstring. The bases are looked up in `module`.
    """
    found = []
    for names, node in definitions(ast.parse(source)):
        overload = any("overload" in ast.unparse(d) for d in node.decorator_list)
        if overload or not all(map(is_public, names)) or ast.get_docstring(node):
            continue
        if module is None or not is_inherited(import_module(module), names):
            found.append(".".join(names))
    return found


def is_inherited(module: ModuleType, names: Sequence[str]) -> bool:
    """Whether a method overrides a documented one, or one of a library, which documents it."""
    *classes, name = names
    cls = reduce(getattr, classes, module)
    return any(
        inspect.getdoc(vars(base)[name]) or base.__module__.partition(".")[0] != "taxolens"
        for base in (getattr(cls, "__mro__", ()))[1:]
        if name in vars(base)
    )


def without_shape(source: str) -> list[str]:
    """The public functions and properties annotated to return an array whose docstring has no shape.

    Only documented ones: a method without a docstring has the shapes of the method that it overrides.
    """
    found = []
    for names, node in definitions(ast.parse(source)):
        if isinstance(node, ast.ClassDef) or not all(map(is_public, names)) or not node.returns:
            continue
        text = ast.get_docstring(node)
        returns = re.findall(r"\w+", ast.unparse(node.returns))
        if text and any(array in returns for array in ARRAYS) and not SHAPE.search(text):
            found.append(".".join(names))
    return found


def raised(source: str) -> Iterator[tuple[ast.Call, ast.Raise | None]]:
    """(call, its raise statement where it is one) of every error of registry/errors.py."""
    tree = ast.parse(source)
    statements = {id(node.exc): node for node in ast.walk(tree) if isinstance(node, ast.Raise)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ERRORS:
            yield node, statements.get(id(node))


def is_message(node: ast.expr) -> bool:
    """Whether an expression is a call of a message function, or an entry of a mapping of messages."""
    node = node.value if isinstance(node, ast.Subscript) else node
    node = node.func if isinstance(node, ast.Call) else node
    return ast.unparse(node).rpartition(".")[2] in MESSAGES


def not_in_parts(source: str) -> list[str]:
    """The errors that are given one text, which comes from none of the functions in MESSAGES."""
    return [
        ast.unparse(call)
        for call, _ in raised(source)
        if len(call.args) != 2 and not (len(call.args) == 1 and is_message(call.args[0]))
    ]


def without_allowed(source: str) -> list[str]:
    """The first arguments of the ConfigErrors in parts that do not say what is allowed.

    `raise ... from error` may report the text of a library's error, which says it or does not.
    """
    return [
        ast.unparse(call.args[0])
        for call, statement in raised(source)
        if ast.unparse(call.func).rpartition(".")[2] in CONFIG_ERRORS and len(call.args) == 2
        if "allowed" not in {keyword.arg for keyword in call.keywords}
        if statement is None or not isinstance(statement.cause, ast.Name)
    ]


def module_of(file: str) -> str:
    return "taxolens." + file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@pytest.mark.parametrize("room", ROOMS)
def test_public_definitions_are_documented(room: str) -> None:
    found = {
        f"{file}: {name}"
        for file, source in SOURCES.items()
        if file.startswith(f"{room}/")
        for name in undocumented(source, module_of(file))
    }
    assert found == {name for name in NO_DOCSTRING if name.startswith(f"{room}/")}


def test_functions_that_return_arrays_state_shapes() -> None:
    found = {f"{file}: {name}" for file, text in SOURCES.items() for name in without_shape(text)}
    assert found == set(NO_SHAPE)


def test_errors_are_built_from_parts() -> None:
    found = {f"{file}: {call}" for file, text in SOURCES.items() for call in not_in_parts(text)}
    assert found == set(BUILT_OTHERWISE)


def test_config_errors_say_what_is_allowed() -> None:
    found = {f"{file}: {arg}" for file, text in SOURCES.items() for arg in without_allowed(text)}
    assert found == set(WITHOUT_ALLOWED)


def test_a_missing_docstring_is_found() -> None:
    source = '''
class Bare:
    """Documented."""
    def bare(self): ...
    def shown(self):
        "Documented."
    def _private(self): ...
class _Private:
    def inner(self): ...
def free(): ...
'''
    assert undocumented(source) == ["Bare.bare", "free"]


def test_an_inherited_docstring_counts() -> None:
    class Base:
        def documented(self) -> None:
            """Documented."""

        def bare(self) -> None: ...

    class Lower(Base, dict[str, int]):
        def documented(self) -> None: ...

        def bare(self) -> None: ...

        def new(self) -> None: ...

        def popitem(self) -> tuple[str, int]:
            return "", 0

    module = ModuleType("made_up")
    module.Lower = Lower  # type: ignore[attr-defined]
    Base.__module__ = "taxolens.made_up"
    names = ("documented", "bare", "new", "popitem")
    assert [n for n in names if is_inherited(module, ["Lower", n])] == ["documented", "popitem"]
    assert not is_inherited(module, ["Lower"])


def test_a_missing_shape_is_found() -> None:
    source = """
def bare() -> np.ndarray:
    "The weights."
def shaped() -> tuple[Tensor, int]:
    "(n, m) weights."
def one() -> Tensor:
    "Scalar loss."
def text() -> str:
    "The text."
"""
    assert without_shape(source) == ["bare"]


def test_an_error_of_one_text_is_found() -> None:
    source = """
raise ConfigError(f"{field} is wrong")
raise errors.DataError("file", "damaged")
raise ConfigError(unknown_name_message("k", n, known))
raise TaxolensError(self.failures[key])
raise DataError(str(error))
raise ValueError("of no grammar")
"""
    assert not_in_parts(source) == ["ConfigError(f'{field} is wrong')", "DataError(str(error))"]


def test_a_config_error_without_allowed_is_found() -> None:
    source = """
raise ConfigError("lr", "not possible")
raise UnknownNameError("preset", "not known", given=name) from None
raise ConfigError("a", "b", allowed="c")
raise ConfigError("file", error) from error
raise DataError("d", "e")
"""
    assert without_allowed(source) == ["'lr'", "'preset'"]
