"""A study that was measured in parts is joined, and the images of its training are counted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import study
from results_factory import make_results


def test_parts_of_a_study_are_joined(tmp_path: Path) -> None:
    """Evaluators of the same SAEs, and other SAEs; q is adjusted over all of them."""
    settings = dict.fromkeys(study.SETTINGS, 3)
    whole = replace(make_results(tmp_path), settings=settings)
    first, last = whole.saes[0], whole.saes[-1]
    names = list(first.evaluators)

    def part(sae, *evaluators: str):
        infos = {name: whole.evaluators[name] for name in evaluators}
        kept = replace(sae, evaluators={name: sae.evaluators[name] for name in evaluators})
        return replace(whole, evaluators=infos, saes=[kept])

    joined = study.joined([part(first, *names[1:]), part(first, names[0]), part(last, *names)])
    assert set(joined.evaluators) == set(names) and len(joined.saes) == 2
    of_both = replace(whole, saes=[first, last])

    def numbers(results):
        return {(sae.id, *name): number for sae, *name, number in results.rows()}

    assert repr(sorted(numbers(joined).items())) == repr(
        sorted(numbers(study.with_q(of_both)).items())
    )

    with pytest.raises(ValueError, match="another dataset"):
        study.joined([whole, replace(whole, dataset=replace(whole.dataset, n_images=1))])
    with pytest.raises(ValueError, match="other settings"):
        study.joined([whole, replace(whole, settings={**settings, "seed": 99})])


def test_the_images_of_the_training_are_those_that_the_saes_record(tmp_path: Path) -> None:
    folder = tmp_path / "blocks.2" / "topk"
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_text(json.dumps({"metadata": {"n_images": 16160}}))
    assert study.training_images(tmp_path) == 16160
