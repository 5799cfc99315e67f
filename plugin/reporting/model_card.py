"""The model card of published SAEs: what they are, how they were trained, and their numbers with nulls."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from ...registry.nulls import LEVEL, NULLS, significant
from .metric_table import COLUMNS, legend, nulls_left_out, p_text, summary_rows
from .results import Results, SAEResult

TAGS = ["sparse-autoencoder", "sae", "taxolens", "vision", "interpretability"]
EXPLAINED = ("reconstruction", "explained_variance")
NOT_KNOWN = "–"
NULLS_EXPLAINED = (
    "±: half of the 95 % interval. of: the number of nodes, latents, ... that a value is computed from. "
    "Beside each value the same number under null controls: classes "
    "permuted over the tree (mean and p of the draws; the main null), labels shuffled over images, an "
    "untrained twin of the SAE, the neurons. *: q ≤ {level} after Benjamini–Hochberg over this table. "
    "A dash: not defined there, {left_out}or not judged: computed from too few nodes, latents or draws, or "
    "without one of the first two nulls."
)
TRAINING = {
    "dataset_path": "images",
    "dataset_name": "configuration",
    "split": "split",
    "n_images": "number of images",
    "training_tokens": "training tokens",
    "lr": "learning rate",
    "train_batch_size_tokens": "batch, in tokens",
    "seed": "seed",
    "taxolens_version": "taxolens",
    "sae_lens_version": "SAELens",
}


def model_card(
    results: Results,
    repository: str,
    trained: Mapping[str, Mapping[str, Any]],
    *,
    picture: str,
    files: Mapping[str, str],
    base_models: Sequence[str] = (),
    datasets: Sequence[str] = (),
    licence: str | None = None,
) -> str:
    """The text of README.md, with the front matter that the Hugging Face hub reads.

    Args:
        results: the SAEs and their numbers; the id of an SAE is its folder in the repository.
        repository: ``owner/name``.
        trained: SAE id -> settings of its training.
        picture: file of the picture.
        files: other file -> what it is.
        base_models: names of the models on the hub.
        datasets: names of the datasets on the hub.
        licence: by the hub's identifier.
    """
    front = {
        "library_name": "saelens",
        "tags": TAGS,
        **({"license": licence} if licence else {}),
        **({"base_model": list(base_models)} if base_models else {}),
        **({"datasets": list(datasets)} if datasets else {}),
    }
    first = results.saes[0].id
    dataset, tree = results.dataset, results.taxonomy
    numbers = summary_rows(results)
    left_out = ", ".join(COLUMNS[name] for name in nulls_left_out(results))
    past = "past the nulls that were computed" if left_out else "past the nulls"
    seen = "They were held out."
    if dataset.seen_in_training:
        seen = "These images were trained on."
    elif dataset.training_known is False:
        seen = "It is not known whether the SAEs were trained on them."
    if dataset.n_also_trained_on:
        seen += (
            f" {dataset.n_also_trained_on:,} of the {dataset.n_compared:,} that were compared are "
        )
        seen += "byte for byte images that the SAEs were trained on."
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {repository}",
        f"{len(results.saes)} sparse autoencoder{'s' * (len(results.saes) > 1)} on the activations of a "
        "vision model, in SAELens's layout.",
        f'```python\nfrom sae_lens import SAE\n\nsae = SAE.from_pretrained("{repository}", "{first}")\n```',
        f"```\ntaxolens evaluate {repository}:{first} --dataset_path IMAGES --taxonomy TREE "
        "--output_path FOLDER\n```",
        _table(SAES, [_described(sae) for sae in results.saes]),
        "L0: mean number of latents that are not 0 on an image, and on a token. EV: explained variance"
        + ("." if any(math.isfinite(_explained(sae)) for sae in results.saes) else ", not measured."),
        "## Training",
        *_training(trained),
        "## Evaluation",
        f"{dataset.n_images:,} images of {_text(dataset.path)} ({_text(dataset.split)}), "
        f"{tree.n_classes:,} classes in the tree {_text(tree.name)} of {tree.n_nodes:,} nodes. {seen}",
        f"![The first metric of the table beside its null controls]({picture})",
        _table(["metric", "SAE", "value", "of", *(COLUMNS[n] for n in NULLS), "p", "q", past],
               [_numbers(row) for row in numbers]),
        *legend(results).splitlines()[:-1],  # the last line is about the marks of the terminal's table
        NULLS_EXPLAINED.format(level=LEVEL, left_out=f"not computed ({left_out}), " if left_out else ""),
        *(f"- [{file}]({file}): {what}" for file, what in files.items()),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


SAES = ["folder", "model", "hook point", "tokens", "architecture", "d_in", "d_sae"]
SAES += ["L0 of an image", "L0 of a token", "EV"]


def _described(sae: SAEResult) -> list[Any]:
    return [
        f"`{sae.id}`",
        *(_text(value) for value in (sae.model_name, sae.place, sae.tokens, sae.trained_as)),
        f"{sae.d_in:,}",
        f"{sae.d_sae:,}",
        _number(sae.l0),
        _number(sae.l0_token),
        _number(_explained(sae)),
    ]


def _explained(sae: SAEResult) -> float:
    evaluator, metric = EXPLAINED
    found = sae.evaluators.get(evaluator)
    number = found.metrics.get(metric) if found else None
    return math.nan if number is None else number.value


def _numbers(row: Mapping[str, Any]) -> list[Any]:
    """One number beside its nulls, as a row of the table."""
    half = max(row["high"] - row["value"], row["value"] - row["low"])  # one may be cut
    past = {
        True: "yes",
        False: f"not {', '.join(map(COLUMNS.__getitem__, row['not_left_behind']))}",
    }
    judged = NOT_KNOWN if row["undecided"] else past[not row["not_left_behind"]]
    return [
        _text(row["title"]),
        f"`{row['sae']}`",
        _number(row["value"]) + (f" ± {_number(half)}" if math.isfinite(half) else ""),
        NOT_KNOWN if row["support"] is None else f"{row['support']:,}",
        *(_number(row.get(name, math.nan)) for name in NULLS),
        _p(row["p"]),
        f"{_p(row['q'])}{'*' * significant(row['q'])}",
        _text(judged),
    ]


def _training(trained: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    """The settings of the training, once where all SAEs have the same."""
    shown = {
        id: {
            title: settings[name]
            for name, title in TRAINING.items()
            if settings.get(name) is not None
        }
        for id, settings in trained.items()
    }
    distinct: list[dict[str, Any]] = []
    for settings in shown.values():
        if settings not in distinct:
            distinct.append(settings)
    for settings in distinct:
        ids = [id for id, own in shown.items() if own == settings]
        of = f"{', '.join(f'`{id}`' for id in ids)}: " if len(distinct) > 1 else ""
        yield of + "; ".join(f"{title} {_text(value)}" for title, value in settings.items()) + "."


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _number(value: float) -> str:
    return f"{value:.3g}" if isinstance(value, (int, float)) and math.isfinite(value) else NOT_KNOWN


def _p(p: float) -> str:
    return p_text(p, 3, "g") if math.isfinite(p) else NOT_KNOWN


def _text(value: Any) -> str:
    """A text of a file as Markdown that is no markup."""
    text = " ".join(str(value).split())
    for mark in "\\`*_[]<>|#":
        text = text.replace(mark, f"\\{mark}")
    return text
