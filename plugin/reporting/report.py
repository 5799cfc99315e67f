"""`report.html`: one file that needs no network, and no scripts except for interactive figures."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

import plotly.offline
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ...registry.errors import ConfigError, DataError
from ...registry.files import (
    MAX_DATA_BYTES,
    UnreadableError,
    read_bytes,
    read_json_object,
    reason,
    write_atomically,
)
from ...registry.nulls import CONSTRAINTS, DECISIVE, NULLS
from ...registry.presentation import NodeTable
from ...registry.taxonomies.taxonomy import Taxonomy
from . import charts
from .charts import NULL_STYLES, RUN_STYLES, VALUE, Line, Style
from .controls import SAEWithControls, with_controls
from .headlines import ShownMetric, headlines
from .metric_table import (
    COLUMNS,
    UNFINISHED,
    exchangeable,
    nulls_left_out,
    numbers_of_draws,
    p_text,
)
from .results import LatentCard, MetricResult, Results, SAEResult
from .series import Series, all_series, is_by_layer, natural_key, positions
from .short_names import short_names
from .tree_chart import Icicle, labels, scale

REPORT_FILENAME = "report.html"
UNTELLING = ("model", "checkpoint", "best", "final")  # names of folders that identify no model
TEMPLATES = Path(__file__).parent / "templates"
MAX_FIGURE_BYTES = 2_000_000
JPEG = b"\xff\xd8\xff"
MAX_DRAWN_TREES = 4
MORE_DASHES = ("7 2 1 2", "1 2")


def write_report(
    results: Results, path: str | Path | None = None, *, interactive: bool = True
) -> Path:
    """Write the report of an evaluation.

    Args:
        results: the results.
        path: the file; by default `report.html` in the results folder.
        interactive: include the evaluators' own Plotly figures, and with them plotly.js (5 MB).

    Returns:
        the file.
    """
    if path is None:
        path = (results.folder or Path()) / REPORT_FILENAME
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    view = Report(results, interactive)
    environment.filters.update(
        number=charts.number,
        p_text=_p,
        percent=_percent,
        short_count=_short_count,
        short_name=short_name,
        short_label=view.short_label,
    )
    text = environment.get_template("report.html.j2").render(
        report=view, results=results, unfinished=UNFINISHED
    )
    return write_atomically(path, text)


class Report:
    """The values that the template shows."""

    def __init__(self, results: Results, interactive: bool = True) -> None:
        self.results = results
        self.interactive = interactive
        self.series = all_series(results)
        self.headlines = headlines(results)

    @property
    def subject(self) -> str:
        """The names of the models, of a local one the end of its path."""
        names = dict.fromkeys(short_name(sae.model_name) for sae in self.results.saes)
        return " and ".join(names) or "the model"

    # Numbers ------------------------------------------------------------------------------------

    def direction(self, headline: ShownMetric) -> str:
        """The direction of a metric in words."""
        better = self.results.direction(headline.evaluator, headline.metric)
        return {True: "higher is better", False: "lower is better", None: "descriptive"}[better]

    def verdict(self, series: Series, headline: ShownMetric) -> dict[str, Any]:
        """One metric over a series: first, last and best value, and where it beats its nulls.

        The best is that of the values that the table does not call not judged.
        """
        found = [(sae, number) for sae in series if (number := headline.of(sae))]
        defined = [(sae, number) for sae, number in found if math.isfinite(number.value)]
        directed = [n for _, n in defined if n.past_all is not None]
        permuted = [
            null.past for n in directed if (null := n.nulls.get(DECISIVE)) and null.past is not None
        ]
        direction = self.direction(headline)
        ranked = [] if direction == "descriptive" else [f for f in defined if not f[1].not_judged]
        extreme = min if direction == "lower is better" else max
        best = extreme(ranked, key=lambda f: f[1].value, default=None)
        ends = [headline.of(sae) for sae in (series.saes[0], series.saes[-1])]
        first, last = (number.value if number else math.nan for number in ends)
        undecided: dict[str, list[str]] = {}
        for sae, number in defined:
            if number.not_judged:
                undecided.setdefault(number.not_judged, []).append(self.place(sae))
        return {
            "first": first,
            "last": last,
            "best": best[1].value if best else math.nan,
            "best_at": self.place(best[0]) if best and len(series) > 1 else "",
            "n": len(directed),
            "n_permuted": len(permuted),
            "past_permuted": sum(permuted),
            "past_all": sum(bool(n.past_all) for n in directed),
            "undecided": [
                (", ".join(dict.fromkeys(places)) if len(series) > 1 else "", why)
                for why, places in undecided.items()
            ],
            "missed": [
                COLUMNS.get(name, name) for name in NULLS if any(name in n.missed for n in directed)
            ],
        }

    @property
    def exchangeable(self) -> str:
        """The number of classes and of trees behind the nulls of permuted classes."""
        permuted = self.results.permuted_classes
        return exchangeable(permuted) if permuted else ""

    @property
    def few_draws(self) -> str:
        """The numbers of draws of the nulls but the main one: "shuffled labels 1 draw, ..."."""
        draws = numbers_of_draws(self.results, self.headlines)
        return ", ".join(f"{COLUMNS.get(n, n)} {draws[n]}" for n in draws if n != DECISIVE)

    @property
    def left_out(self) -> str:
        """The nulls that were not asked for, in words."""
        return ", ".join(COLUMNS.get(name, name) for name in nulls_left_out(self.results))

    def support(self, evaluator: str, metric: str, number: MetricResult) -> str:
        """What a number is computed from: "213 nodes"; empty where that is not declared."""
        of = self.results.evaluators[evaluator].support.get(metric)
        return f"{number.support:,} {of.unit}" if of and number.support is not None else ""

    def missed(self, number: MetricResult) -> str:
        """The nulls that a number does not beat, in words."""
        return ", ".join(COLUMNS.get(name, name) for name in number.missed)

    def place(self, sae: SAEResult) -> str:
        """The layer of an SAE, or its hook point where layers do not number the SAEs."""
        return f"layer {sae.layer}" if self._by_layer else sae.place

    @cached_property
    def _by_layer(self) -> bool:
        """Whether layers number the SAEs of every series."""
        return all(is_by_layer(series.saes) for series in self.series)

    def side_by_side(self, headline: ShownMetric) -> list[tuple[str, list[MetricResult | None]]]:
        """(place, its number in every series), for the comparison of series."""
        places = dict.fromkeys(self.place(sae) for series in self.series for sae in series)
        found = []
        for place in sorted(places, key=natural_key):
            row = []
            for series in self.series:
                here = [sae for sae in series if self.place(sae) == place]
                row.append(headline.of(here[0]) if here else None)
            found.append((place, row))
        return found

    @cached_property
    def with_controls(self) -> list[SAEWithControls]:
        """The SAEs that have controls trained on random, in the order of the series."""
        return with_controls([sae for series in self.series for sae in series])

    @property
    def constraints(self) -> list[str]:
        """The constraints of those controls."""
        return [c for c in CONSTRAINTS if any(c in own for _, own in self.with_controls)]

    @property
    def beside_controls(self) -> list[tuple[SAEResult, list[SAEResult | None]]]:
        """(an SAE with controls, itself and its control of each of `constraints`)."""
        return [
            (sae, [sae, *(controls.get(c) for c in self.constraints)])
            for sae, controls in self.with_controls
        ]

    def describe(self, sae: SAEResult) -> str:
        """An SAE's name, with its hook point where the name does not contain it."""
        return sae.id if sae.place in sae.id else f"{sae.id} ({sae.place})"

    def all_metrics(self, evaluator: str) -> list[tuple[str, list[tuple[SAEResult, MetricResult]]]]:
        """(metric, its number for every SAE) of one evaluator."""
        saes = [sae for series in self.series for sae in series]
        shown = [ShownMetric(e, m, m) for e, m in self.results.metric_names() if e == evaluator]
        return [(m.metric, [(sae, n) for sae in saes if (n := m.of(sae))]) for m in shown]

    def notes(self, evaluator: str) -> list[tuple[str, str]]:
        """(note, the SAEs it is about) of one evaluator."""
        found: dict[str, list[str]] = {}
        for sae in self.results.saes:
            for note in sae.evaluators[evaluator].notes if evaluator in sae.evaluators else []:
                found.setdefault(note, []).append(sae.id)
        everything = len(self.results.saes)
        return [
            (note, "every SAE" if len(saes) == everything > 1 else ", ".join(saes))
            for note, saes in found.items()
        ]

    # Charts -------------------------------------------------------------------------------------

    @cached_property
    def lines(self) -> list[tuple[Style, str]]:
        """(style, words) of the lines of the charts."""
        if self.compares and self.layered:
            return [
                (style, series.label)
                for series, style in zip(self.series, _styles(len(self.series)), strict=True)
            ] + [(_faint(VALUE), "thin: the same under permuted classes")]
        computed = [
            n for n in NULLS if any(n in m.nulls and m.nulls[n].n for *_, m in self.results.rows())
        ]
        return [(VALUE, "the SAE"), *((NULL_STYLES[n], COLUMNS.get(n, n)) for n in computed)]

    @property
    def legend(self) -> list[tuple[Markup, str]]:
        """(line sample, words) of the charts."""
        return [(charts.key(style), words) for style, words in self.lines]

    @property
    def layered(self) -> bool:
        """Whether any series has several layers."""
        return any(len(series) > 1 for series in self.series)

    @property
    def compares(self) -> bool:
        """Whether there are several series."""
        return len(self.series) > 1

    def charts(self) -> Iterator[dict[str, Any]]:
        """Title, source, direction and chart of each headline metric."""
        for headline in self.headlines:
            yield {
                "title": headline.title,
                "source": f"{headline.evaluator} / {headline.metric}",
                "direction": self.direction(headline),
                "svg": self.chart(headline),
            }

    def chart(self, headline: ShownMetric) -> Markup:
        """The metric and its nulls over layers; a row per SAE where there are no layers."""
        label = f"{headline.title}, over layers"
        if not self.layered:
            return charts.dots(
                {series.label: self._lines(series, headline, VALUE) for series in self.series},
                label=headline.title,
            )
        lines = []
        for series, style in zip(self.series, _styles(len(self.series)), strict=True):
            found = self._lines(series, headline, style)
            if self.compares:
                permuted = [line for line in found if line.label == COLUMNS["permuted_classes"]]
                found = [
                    replace(found[0], label=series.label),
                    *(
                        Line(f"{series.label}, permuted classes", line.x, line.y, _faint(style))
                        for line in permuted
                    ),
                ]
            lines += found
        x_ticks = {x: text for series in self.series for x, text in self._positions(series)}
        return charts.curves(
            lines,
            label=label,
            x_ticks=dict(sorted(x_ticks.items())),
            x_title="layer" if self._by_layer else "hook point",
        )

    def _positions(self, series: Series) -> list[tuple[float, str]]:
        """(position, tick label) of each SAE of a series on the axis that all series share."""
        own = positions(series)
        if self._by_layer or not self.compares:
            return own
        return [(self._order[sae.place], text) for sae, (_, text) in zip(series, own, strict=True)]

    @cached_property
    def _order(self) -> dict[str, float]:
        """The position of each hook point among those of all series."""
        places = {sae.place for series in self.series for sae in series}
        return {place: float(i) for i, place in enumerate(sorted(places, key=natural_key))}

    def figure(self, headline: ShownMetric) -> Markup:
        """The chart as a separate document with title, direction and legend."""
        return charts.captioned(
            self.chart(headline),
            title=headline.title,
            subtitle=self.direction(headline),
            legend=self.lines,
        )

    def _lines(self, series: Series, headline: ShownMetric, style: Style) -> list[Line]:
        numbers = [headline.of(sae) for sae in series]
        x = [position for position, _ in self._positions(series)]
        values = [n.value if n else math.nan for n in numbers]
        bars = [(n.low, n.high) if n else (math.nan, math.nan) for n in numbers]
        lines = [Line("the SAE", x, values, style, bars=bars)]
        for name in NULLS:
            nulls = [n.nulls.get(name) if n else None for n in numbers]
            mean = [null.mean if null else math.nan for null in nulls]
            if not any(map(math.isfinite, mean)):
                continue
            best = [null.best if null and null.n > 1 else math.nan for null in nulls]
            lines.append(Line(COLUMNS.get(name, name), x, mean, NULL_STYLES[name], mean, best))
        return lines

    # Latents, tree, figures -----------------------------------------------------------------------

    def with_latents(self) -> list[SAEResult]:
        """The SAEs whose latents are shown, the last layer first."""
        return [
            sae
            for series in self.series
            for sae in reversed(series.saes)
            if sae.most_specific or sae.least_specific
        ]

    def thumbnail(self, file: str | None) -> str | None:
        """The image as a data URI; None where the file is missing.

        Raises:
            DataError: it lies outside of the results folder, or is no JPEG.
        """
        path = None if file is None else self.results.file(file)
        if path is None:
            return None
        try:
            data = read_bytes(path, MAX_FIGURE_BYTES)
        except (OSError, UnreadableError) as error:
            raise DataError(path, reason(error)) from None
        if not data.startswith(JPEG):
            raise DataError(path, "not a JPEG image", allowed="what `taxolens evaluate` writes")
        return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"

    @staticmethod
    def covers(card: LatentCard) -> str:
        """The number of classes at or below the card's node, in words."""
        if not math.isfinite(card.generality):
            return ""
        n = round(2**card.generality)
        return "1 class" if n == 1 else f"{n:,} classes"

    @cached_property
    def taxonomy(self) -> Taxonomy:
        """The class tree.

        Raises:
            DataError: `results.json` has none.
        """
        try:
            return Taxonomy.from_json(json.dumps(self.results.taxonomy.tree))
        except ConfigError as error:
            raise DataError("results.json: taxonomy.tree", error) from None

    @cached_property
    def icicle(self) -> Icicle:
        """The layout of the class tree."""
        return Icicle(self.taxonomy, self.short_labels)

    @cached_property
    def short_labels(self) -> dict[str, str]:
        """Name of a node -> its short name; the dataset's names of the classes count as theirs."""
        shown = labels(self.taxonomy)
        classes = [shown[v] for v in self.taxonomy.class_nodes]
        of_dataset = self.results.dataset.classes
        known = len(of_dataset) == len(classes)
        return short_names(shown, zip(of_dataset, classes if known else of_dataset, strict=True))

    def short_label(self, name: str) -> str:
        """The short name of a class or node."""
        return self.short_labels.get(name, name)

    @cached_property
    def tree_colour(self) -> str:
        """The meaning of the colours of the covered tree."""
        found = [
            table
            for name, info in self.results.evaluators.items()
            if (table := info.node_table) is not None and table.f1
            for sae in self.results.saes
            if name in sae.evaluators and table.name in sae.evaluators[name].tables
        ]
        return min(found, key=lambda table: table.priority, default=NodeTable("")).meaning

    @property
    def scale(self) -> list[tuple[str, str]]:
        """(fill, range of F1) for the legend of the tree."""
        return scale()

    @cached_property
    def covered(self) -> list[tuple[Series, list[SAEResult], SAEResult]]:
        """(series, its SAEs with node scores, the one of them with the highest mean F1)."""
        found = []
        for series in self.series:
            saes = [sae for sae in series if sae.node_f1]
            if saes:
                found.append((series, saes, max(saes, key=_mean_f1)))
        return found[:MAX_DRAWN_TREES]

    @cached_property
    def figures(self) -> dict[str, list[tuple[str, Markup]]]:
        """Figure -> (SAE, its Plotly JSON) for every SAE that has it, the last layer first."""
        found: dict[str, list[tuple[str, Markup]]] = {}
        if not self.interactive or self.results.folder is None:
            return found
        for sae in reversed([sae for series in self.series for sae in series]):
            for evaluator, result in sae.evaluators.items():
                for name, file in result.figures.items():
                    path = self.results.file(file)
                    if path is not None and path.stat().st_size <= MAX_FIGURE_BYTES:
                        figure = (self.describe(sae), _script_json(path))
                        found.setdefault(f"{evaluator} / {name}", []).append(figure)
        return found

    def plotly_js(self) -> Markup:
        """The source of plotly.js."""
        return Markup(plotly.offline.get_plotlyjs())


def _styles(n: int) -> list[Style]:
    """`n` styles that differ in marker and colour, and from the ninth on in dashes."""
    if n == 1:
        return [VALUE]
    found = []
    for i in range(n):
        again, which = divmod(i, len(RUN_STYLES))
        dashes = MORE_DASHES[(again - 1) % len(MORE_DASHES)] if again else RUN_STYLES[which].dashes
        found.append(replace(RUN_STYLES[which], dashes=dashes))
    return found


def _faint(style: Style) -> Style:
    return Style(style.colour, style.marker, "2 3", 1.0)


def _mean_f1(sae: SAEResult) -> float:
    scores: Sequence[float] = [value for value in sae.node_f1.values() if math.isfinite(value)]
    return sum(scores) / len(scores) if scores else -1.0


def _p(p: float | None) -> str:
    """A p- or q-value; a dash where it is undefined."""
    return p_text(p, 3) if p is not None and 0 < p < 1 else charts.number(p)


def _percent(share: float) -> str:
    return f"{share:.1%}".replace("%", " %") if not 0 < share < 0.0005 else "< 0.1 %"


def _short_count(n: int) -> str:
    return f"{n:,}"


def read_figure(path: Path) -> dict[str, Any]:
    """A Plotly figure's JSON.

    Raises:
        DataError: it is none.
    """
    try:
        figure = read_json_object(path, MAX_DATA_BYTES)
    except (OSError, UnreadableError) as error:
        raise DataError(path, f"not a figure: {reason(error)}") from None
    if not isinstance(figure.get("data"), list) or not isinstance(figure.get("layout", {}), dict):
        raise DataError(path, "not a figure: Plotly's have a list `data` and an object `layout`")
    return figure


def _script_json(path: Path) -> Markup:
    """Plotly's JSON, escaped for a script element, without the large default template."""
    figure = read_figure(path)
    layout = figure.setdefault("layout", {})
    layout["template"] = {}
    layout.setdefault("margin", {"l": 60, "r": 20, "t": 40, "b": 50})
    text = json.dumps(figure, ensure_ascii=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def short_name(model_name: str) -> str:
    """The last part of a path, or the last two where it is in UNTELLING; hub names unchanged."""
    path = PurePath(model_name)
    if len(path.parts) <= 2 and not path.is_absolute():
        return model_name
    return "/".join(path.parts[-2:]) if path.name in UNTELLING else path.name
