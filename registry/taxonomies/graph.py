"""Directed graphs as `child -> parents`: checks, ancestors and depths for a taxonomy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ..errors import ConfigError

Parents = Mapping[str, Sequence[str]]


def parents_of(edges: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """The parents of each node from (parent, child) pairs; repeated pairs count once."""
    parents: dict[str, dict[str, None]] = {}
    for parent, child in edges:
        parents.setdefault(parent, {})
        parents.setdefault(child, {})[parent] = None
    return {node: list(above) for node, above in parents.items()}


def check_one_rooted(parents: Parents) -> None:
    """Raise a ConfigError with the nodes of a cycle, or the roots if there are several."""
    if cycle := find_cycle(parents):
        if len(cycle) > 12:
            cycle[6:-1] = [f"{len(cycle) - 7} more"]
        problem = f"cycle {' -> '.join(cycle)} (parent -> child)"
        raise ConfigError("taxonomy", problem, allowed="a graph without cycles")
    roots = sorted(node for node, above in parents.items() if not above)
    if len(roots) > 1:
        raise ConfigError(
            "taxonomy", f"{len(roots)} roots: {listed(roots)}", allowed="one; add a node above them"
        )


def find_cycle(parents: Parents) -> list[str] | None:
    """The nodes of one cycle from parent to child, the first repeated at the end; None if none."""
    done: set[str] = set()
    for start in parents:
        path: list[str] = []
        on_path: set[str] = set()
        stack = [(start, False)]
        while stack:
            node, leaving = stack.pop()
            if leaving:
                path.pop()
                on_path.discard(node)
                done.add(node)
            elif node in on_path:
                cycle = [*path[path.index(node) :], node]
                return cycle[::-1]  # collected from child to parent
            elif node not in done:
                path.append(node)
                on_path.add(node)
                stack.append((node, True))
                stack.extend((above, False) for above in parents[node])
    return None


def classes_below(
    parents: Parents, depth: Mapping[str, int], classes: Sequence[str]
) -> dict[str, int]:
    """Node -> the classes at or below it, as the bits of an integer."""
    below = dict.fromkeys(parents, 0)
    for bit, name in enumerate(classes):
        below[name] |= 1 << bit
    for node in sorted(parents, key=depth.__getitem__, reverse=True):
        for above in parents[node]:
            below[above] |= below[node]
    return below


def depths(parents: Parents) -> dict[str, int]:
    """Node -> longest path from a node without parents, in edges."""
    depth: dict[str, int] = {}
    stack = list(parents)
    while stack:
        node = stack[-1]
        missing = [above for above in parents[node] if above not in depth]
        if missing:
            stack.extend(missing)
        else:
            depth[stack.pop()] = max((depth[above] + 1 for above in parents[node]), default=0)
    return depth


def listed(names: Iterable[str], most: int = 10) -> str:
    """The first `most` names in quotes, and the number of further ones."""
    names = list(names)
    shown = ", ".join(map(repr, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
