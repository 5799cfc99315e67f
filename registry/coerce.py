"""Type coercion: values from files and flags, checked and converted by type hints."""

from __future__ import annotations

import contextlib
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints


def is_real(value: Any) -> bool:
    """Whether a value is a finite number."""
    return type(value) in (int, float) and math.isfinite(value)


class MisfitError(ValueError):
    """A value does not fit its type hint: `place: not possible; given X; allowed: a type`."""


def coerce(value: Any, hint: Any, where: str = "", *, lenient: bool = False) -> Any:
    """Convert `value` to `hint`: a scalar, `Any`, literal, union, list, tuple, dict or dataclass.

    By default as for JSON: null is the NaN of a float, and keys that are not fields of a dataclass
    are ignored, as a later minor version may have added them.

    Args:
        where: place of the value, for the message.
        lenient: for YAML and flags. Text may be a number ("3e-4") or a list of one; an integral
            float may be an int; null is not a float; dataclasses and other classes are unchanged.

    Raises:
        MisfitError: the value does not fit.
    """
    kind: Any = get_origin(hint) or hint
    members = get_args(hint)
    if hint is Any:
        return value
    if kind in (Union, types.UnionType):
        return _first_fit(value, members, where, lenient)
    if kind is Literal:
        return value if value in members else _refuse(value, f"one of {members}", where)
    if kind in (list, tuple):
        items = [value] if lenient and isinstance(value, str) else value
        if not isinstance(items, (list, tuple)):
            _refuse(value, "a list", where)
        member = members[0] if members else Any
        return kind(
            coerce(v, member, f"{where}[{i}]", lenient=lenient) for i, v in enumerate(items)
        )
    if kind is dict:
        if not isinstance(value, Mapping):
            _refuse(value, "an object", where)
        member = members[1] if members else Any
        return {k: coerce(v, member, f"{where}.{k}", lenient=lenient) for k, v in value.items()}
    if kind in (int, float):
        return _number(value, kind, where, lenient)
    if is_dataclass(hint) and not lenient:
        return _dataclass(value, hint, where)
    checked = kind in (bool, str, type(None)) or (isinstance(kind, type) and not lenient)
    if checked and not isinstance(value, kind):
        _refuse(value, f"a {kind.__name__}", where)
    return value


def _first_fit(value: Any, members: tuple[Any, ...], where: str, lenient: bool) -> Any:
    """The value as the member of its own type, else as the first member that it fits."""
    exact = [m for m in members if isinstance(m, type) and type(value) is m]
    *others, last = [*exact, *(m for m in members if m is not type(None))]
    for member in others:
        try:
            return coerce(value, member, where, lenient=lenient)
        except MisfitError:
            continue
    return coerce(value, last, where, lenient=lenient)


def _number(value: Any, kind: type[Any], where: str, lenient: bool) -> Any:
    if type(value) is kind:
        return value
    if kind is float and value is None and not lenient:
        return math.nan
    readable = (int, float, str) if lenient else (int,) if kind is float else ()
    if isinstance(value, readable) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            number = float(value)
            if kind is float:
                return number
            if number.is_integer():
                return int(number)
    _refuse(value, "a number or null" if kind is float else "an integer", where)


def _dataclass(value: Any, kind: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        _refuse(value, "an object", where)
    hints = get_type_hints(kind)
    found = {}
    for field in fields(kind):
        if field.name in value:
            found[field.name] = coerce(
                value[field.name], hints[field.name], f"{where}.{field.name}"
            )
        elif field.default is MISSING and field.default_factory is MISSING:
            raise MisfitError(f"{where}: {field.name!r} is missing.")
    return kind(**found)


def _refuse(value: Any, expected: str, where: str) -> NoReturn:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    raise MisfitError(f"{where}: not possible; given {shown}; allowed: {expected}.")
