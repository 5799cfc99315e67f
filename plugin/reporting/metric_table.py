"""Results as one table for the terminal, each number beside its null controls."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ...registry.nulls import DECISIVE, LEAST_DRAWS, LEVEL, NULLS, significant
from .headlines import ShownMetric, headlines
from .results import MetricResult, NullResult, PermutedClassesInfo, Results, SAEResult
from .series import all_series, is_by_layer, kind_of, natural_key

UNFINISHED = "The evaluation was stopped before every SAE was measured. Run it again: finished SAEs are kept."
LABEL_COLUMN = 30
FIRST_COLUMN = 18  # characters; longer titles are wrapped

COLUMNS = {
    "permuted_classes": "permuted classes",
    "shuffled": "shuffled labels",
    "random": "untrained twin",
    "neurons": "neurons",
}
# Narrow enough for 80 columns.
HEADINGS = {
    "permuted_classes": "perm. (p)",
    "shuffled": "shuff.",
    "random": "twin",
    "neurons": "neur.",
}


def summary_table(results: Results, shown: Sequence[ShownMetric] | None = None) -> Table:
    """One table of the headline metrics: a section per metric, a row per SAE in order of depth.

    Metrics that no SAE has are left out.
    """
    table = Table(
        title=_title(results),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("", style="cyan", no_wrap=True)
    # A name that is long is folded: it would leave no place for the numbers.
    table.add_column(
        "layer" if _layers(results) else "SAE",
        justify="right",
        overflow="fold",
        max_width=LABEL_COLUMN,
    )
    table.add_column("value", justify="right", style="bold", no_wrap=True)
    table.add_column("of", justify="right", no_wrap=True)
    for null in NULLS:
        table.add_column(HEADINGS[null], justify="right", no_wrap=True)
    for metric in headlines(results) if shown is None else shown:
        rows = _rows(results, metric)
        names = wrap(metric.title, FIRST_COLUMN)
        names += [""] * (len(rows) - len(names))
        for i, (sae, number) in enumerate(rows):
            name = "\n".join(names[i:] if i == len(rows) - 1 else names[i : i + 1])
            table.add_row(escape(name), _Name(_label(results, sae)), *_cells(number))
        table.add_section()
    return table


def summary_rows(
    results: Results, shown: Sequence[ShownMetric] | None = None
) -> list[dict[str, Any]]:
    """The same as flat records, for `--json`."""
    return [
        {
            "sae": sae.id,
            "hook_name": sae.hook_name,
            "layer": sae.layer,
            "architecture": sae.trained_as,
            "evaluator": metric.evaluator,
            "metric": metric.metric,
            "title": metric.title,
            "value": number.value,
            "low": number.low,
            "high": number.high,
            "support": number.support,
            **{name: null.mean for name, null in number.nulls.items()},
            **{f"{name}_draws": null.n for name, null in number.nulls.items()},
            "p": (permuted := number.nulls.get(DECISIVE, NullResult())).p,
            "q": permuted.q,
            "not_left_behind": number.missed,
            "undecided": number.undecided or number.not_judged,
        }
        for metric in (headlines(results) if shown is None else shown)
        for sae, number in _rows(results, metric)
    ]


def verdict(results: Results, shown: Sequence[ShownMetric] | None = None) -> str:
    """The number of SAEs at which each headline metric is past its nulls, in one sentence.

    Where fewer SAEs have a number that is judged, their number follows.
    """
    counts, undecided = [], 0
    for metric in headlines(results) if shown is None else shown:
        numbers = [number for _, number in _rows(results, metric)]
        judged = [n for n in numbers if n.past_all is not None]
        undecided += sum(bool(n.nulls and n.not_judged) for n in numbers)
        if judged:
            permuted = [n.nulls.get(DECISIVE, NullResult()).past for n in judged]
            compared = [past for past in permuted if past is not None]
            past_permuted = sum(compared) if compared else "–"
            past_all = sum(bool(n.past_all) for n in judged)
            of = f" of {len(judged)}" * (len(judged) < len(results.saes))
            counts.append(f"{metric.title} {past_permuted} and {past_all}{of}")
    if not counts and not undecided:
        return "No number here has a null to be compared with."
    n = len(results.saes)
    computed = " that were computed" * bool(nulls_left_out(results))
    found = (
        f"Of {n} SAE{'s' * (n != 1)}, past the permuted classes (q ≤ {LEVEL}), and past all nulls"
        f"{computed}: {'; '.join(counts)}."
    )
    numbers = "1 number is" if undecided == 1 else f"{undecided} numbers are"
    few = (
        f"{numbers} not judged: computed from too few nodes, latents or draws, or one null of labels "
        "was not."
    )
    return " ".join([found] * bool(counts) + [few] * bool(undecided))


def legend(results: Results, shown: Sequence[ShownMetric] | None = None) -> str:
    """The meaning of the metrics and of the columns of the table."""
    found = [m for m in (headlines(results) if shown is None else shown) if _rows(results, m)]
    metrics = (f"{m.title}: {m.meaning}{_direction(results, m)}{_unit(results, m)}." for m in found)
    draws = numbers_of_draws(results, found)
    left_out = nulls_left_out(results)
    of = {name: f" ({draws[name]})" if name in draws else "" for name in NULLS}
    of |= dict.fromkeys(left_out, " (not computed)")
    or_left_out = ", or was not computed" * bool(left_out)
    decisive = (
        f"mean and p of {draws[DECISIVE]}; the main null; * q ≤ {LEVEL} after Benjamini–Hochberg over the table"
        if DECISIVE in draws
        else "not computed"
        if DECISIVE in left_out
        else "no draw here"
    )
    return "\n".join(
        [
            *metrics,
            *([exchangeable(results.permuted_classes)] if results.permuted_classes else []),
            "±: half of the 95 % interval. of: the number of nodes, latents, ... that a value is "
            "computed from. Beside each value the same number under null controls: classes permuted "
            f"over the tree ({decisive}), labels shuffled over images"
            f"{of['shuffled']}, untrained twins of the SAE{of['random']}, the neurons{of['neurons']}. A "
            f"null of fewer than {LEAST_DRAWS} draws has to be beaten in every draw. ! the value is not "
            "past this null. ? it is computed from too few nodes, latents or draws to be judged, or one "
            f"of the first two nulls was not computed. A dash: that null is not defined there{or_left_out}.",
        ]
    )


def nulls_left_out(results: Results) -> list[str]:
    """The nulls that were not asked for: the settings do not name them, and no number has them."""
    given = results.settings.get("nulls")
    asked = list(given) if isinstance(given, list) else []
    asked += [null for *_, number in results.rows() for null in number.nulls]
    return [null for null in NULLS if null not in asked]


def numbers_of_draws(results: Results, shown: Sequence[ShownMetric]) -> dict[str, str]:
    """Null -> the number of its draws, "99 draws" or "54 to 99 draws", of the nulls that have any."""
    counts: dict[str, set[int]] = {}
    for metric in shown:
        for _, number in _rows(results, metric):
            for name, null in number.nulls.items():
                if null.n:
                    counts.setdefault(name, set()).add(null.n)
    return {
        name: f"{min(n)} draw{'s' * (n != {1})}" if len(n) == 1 else f"{min(n)} to {max(n)} draws"
        for name, n in counts.items()
    }


def exchangeable(permuted: PermutedClassesInfo) -> str:
    """The classes and trees behind the nulls of permuted classes, with a warning where few can move."""
    trees = "distinct tree was" if permuted.draws == 1 else "distinct trees were"
    few = " These are few: no number tests the places of the others."
    return (
        "Classes are permuted only among those with a like number of images: "
        f"{permuted.movable:,} of the {permuted.present:,} classes present can move; "
        f"{permuted.draws:,} {trees} drawn.{few * (permuted.movable < permuted.present / 2)}"
    )


def _unit(results: Results, metric: ShownMetric) -> str:
    """What a metric is computed from."""
    info = results.evaluators.get(metric.evaluator)
    of = info.support.get(metric.metric) if info else None
    return f"; of {of.unit}" if of else ""


def _direction(results: Results, metric: ShownMetric) -> str:
    """The direction of a metric where it is not "higher is better"."""
    better = results.direction(metric.evaluator, metric.metric)
    return {True: "", False: " (lower is better)", None: " (descriptive)"}[better]


def _title(results: Results) -> str:
    """What all SAEs share: their series, where there is one, and their architecture."""
    series = all_series(results)
    kinds = {sae.trained_as for sae in results.saes}
    shared = [*(s.label for s in series if len(series) == 1), *(kinds if len(kinds) == 1 else ())]
    return escape(" · ".join(filter(None, shared)))


def _rows(results: Results, shown: ShownMetric) -> list[tuple[SAEResult, MetricResult]]:
    saes = (sae for series in all_series(results) for sae in series)
    return [(sae, number) for sae in saes if (number := shown.of(sae))]


def _layers(results: Results) -> bool:
    """Whether the layer alone identifies an SAE."""
    saes = sorted(results.saes, key=lambda sae: natural_key(sae.hook_name))
    return len(saes) > 1 and len(set(map(kind_of, saes))) == 1 and is_by_layer(saes)


def _label(results: Results, sae: SAEResult) -> str:
    if _layers(results):
        return str(sae.layer)
    several = len({other.trained_as for other in results.saes}) > 1
    return f"{sae.id} ({sae.trained_as})" if several and sae.trained_as not in sae.id else sae.id


@dataclass(frozen=True)
class _Name:
    """A name in lines as wide as its column, which end at its separators where these are near enough."""

    text: str

    @property
    def _parts(self) -> list[str]:
        return re.split(r"(?<=[/:._ -])", self.text)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(max(map(len, self._parts)), len(self.text)).with_maximum(
            options.max_width
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = [""]
        for part in self._parts:
            if lines[-1] and len(lines[-1]) + len(part) > options.max_width:
                lines.append("")
            lines[-1] += part
        yield Text("\n".join(lines), justify="right", overflow="fold")


def _cells(number: MetricResult) -> list[str]:
    half = max(number.high - number.value, number.value - number.low)  # one may be cut
    certain = f" ±{_number(half)}" if math.isfinite(half) else ""
    few = " ?" if number.not_judged else ""
    cells = [_number(number.value) + certain + few]
    cells.append("" if number.support is None else f"{number.support:,}")
    for name in NULLS:
        null = number.nulls.get(name)
        if null is None or null.n == 0:
            cells.append("[dim]–[/]")
            continue
        text = _number(null.mean)
        if name == DECISIVE and math.isfinite(null.p):
            text += f" ({_p(null.p)}{'*' * significant(null.q)})"
        cells.append(f"[yellow]{text}![/]" if name in number.missed else text)
    return cells


def p_text(p: float, digits: int, form: str = "f") -> str:
    """A p- or q-value, with further digits where so few would say 0 or 1, or the other side of `LEVEL`.

    Args:
        p: above 0 and at most 1.
        digits: after the point; significant ones where `form` is "g".
        form: of the format, "f" or "g".
    """
    texts = (f"{p:.{more}{form}}" for more in range(digits, 18))
    return next((text for text in texts if _says(float(text), p)), repr(p))


def _says(shown: float, p: float) -> bool:
    ends = (shown <= 0) == (p <= 0) and (shown >= 1) == (p >= 1)
    return ends and significant(shown) == significant(p)


def _p(p: float) -> str:
    return p_text(p, 2).lstrip("0") if p < 1 else "1"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "undefined"
    value = round(value, 3) + 0.0  # no −0
    return f"{value:.3f}".replace("0.", ".", abs(value) < 1) if abs(value) < 10 else f"{value:.1f}"
