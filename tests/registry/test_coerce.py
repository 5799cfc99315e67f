"""What a value of a file becomes, strictly as JSON or leniently as YAML."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from taxolens.registry.coerce import MisfitError, coerce


@dataclass
class Inner:
    n: int
    share: float = 0.5


@dataclass
class Outer:
    inner: Inner
    parts: list[Inner] = field(default_factory=list)
    by_name: dict[str, float] = field(default_factory=dict)
    free: Any = None


def test_json_becomes_nested_dataclasses():
    data = {
        "inner": {"n": 3, "share": None, "later": "a field that this version lacks"},
        "parts": [{"n": 1, "share": 1}],
        "by_name": {"a": 2, "b": 0.25},
        "free": [1, "x"],
    }
    found = coerce(data, Outer)
    assert math.isnan(found.inner.share) and found.inner.n == 3
    assert found.parts == [Inner(1, 1.0)] and type(found.parts[0].share) is float
    assert found.by_name == {"a": 2.0, "b": 0.25} and found.free == [1, "x"]
    assert coerce({"inner": {"n": 0}}, Outer) == Outer(Inner(0))


@pytest.mark.parametrize(
    ("hint", "value", "message"),
    [
        (Outer, {"inner": {"share": 1}}, r"^f\.inner: 'n' is missing\.$"),
        (Outer, {"inner": 3}, r"^f\.inner: not possible; given 3; allowed: an object\.$"),
        (Outer, {"inner": {"n": 1}, "parts": [{"n": 1}, {"n": 2.0}]}, r"^f\.parts\[1\]\.n: not p"),
        (
            Outer,
            {"inner": {"n": 1}, "by_name": {"a": True}},
            r"^f\.by_name\.a: not possible; given",
        ),
        (int, "3", r"^f: not possible; given '3'; allowed: an integer\.$"),
        (int, True, "not possible; given True; allowed: an integer"),
        (float, "3", "not possible; given '3'; allowed: a number or null"),
        (float, 10**400, r"not possible; given 1000.*\.\.\.; allowed: a number or null\.$"),
        (list[int], "abc", "not possible; given 'abc'; allowed: a list"),
        (bool | None, "up", "not possible; given 'up'; allowed: a bool"),
        (str, None, "not possible; given None; allowed: a str"),
        (Literal["a", "b"], "c", r"not possible; given 'c'; allowed: one of \('a', 'b'\)"),
        (dict[str, int], [1], r"not possible; given \[1\]; allowed: an object"),
    ],
)
def test_a_misfit_in_json_names_the_place(hint, value, message):
    with pytest.raises(MisfitError, match=message):
        coerce(value, hint, "f")


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (float, "3e-4", 3e-4),
        (int, "2e6", 2_000_000),
        (int, 4.0, 4),
        (list[float], "0.5", [0.5]),
        (tuple[int, ...], ["1", 2], (1, 2)),
        (float | str, "0.5", "0.5"),
        (float | bool, "0.5", 0.5),
        (int | str, "a", "a"),
        (dict[str, int], {"a": "3"}, {"a": 3}),
        (Literal[1, "a"], "a", "a"),
        (Inner, {"n": "1"}, {"n": "1"}),
        (range, "left as it is", "left as it is"),
        (None | int, None, None),
    ],
)
def test_lenient_reading(hint, value, expected):
    found = coerce(value, hint, lenient=True)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (float, None),
        (float, True),
        (float, "fast"),
        (int, 2.5),
        (int, "1e400"),
        (bool, 1),
        (str, 3),
    ],
)
def test_what_lenient_reading_refuses(hint, value):
    with pytest.raises(MisfitError, match=f"given {value!r}; allowed: "):
        coerce(value, hint, lenient=True)
