"""Short names of classes and nodes, for where there is little room."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

SEPARATOR = ", "  # of the words of a WordNet synset


def short_names(names: Iterable[str], aliases: Iterable[tuple[str, str]] = ()) -> dict[str, str]:
    """Name -> its first word, as "tench" of "tench, Tinca tinca", where no other name has that (own definition).

    Else ("Turdus merula, male" and "Turdus merula, female") the name as it is. Upper and lower case
    are the same here.

    Args:
        names: those that are shown.
        aliases: (alias, the one of `names` that it also stands for).
    """
    names = dict.fromkeys(names)
    having: dict[str, set[str]] = defaultdict(set)
    for form, name in [*((name, name) for name in names), *aliases]:
        having[form.casefold()].add(name)
        having[first_word(form).casefold()].add(name)
    return {
        name: word if (word := first_word(name)) and len(having[word.casefold()]) == 1 else name
        for name in names
    }


def first_word(name: str) -> str:
    """What stands before the first comma that a space follows."""
    return name.split(SEPARATOR, 1)[0].strip()


def fitted(name: str, room: int) -> str:
    """The name in at most `room` characters, without its middle where it is longer and has several words.

    Two of such names may differ in their ends alone.
    """
    if len(name) <= room:
        return name
    kept = max(1, room - 1)
    tail = kept // 2 if SEPARATOR in name else 0
    return f"{name[: kept - tail]}…{name[len(name) - tail :]}"
