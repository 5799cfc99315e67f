"""Runs and evaluations on a device beside the CPU, simulated: the same weights and numbers.

A tensor on the wrong device is an error there, as it is on CUDA.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import taxolens
import torch
from far_device import DEVICE, FarDevice
from results_factory import tree
from sae_lens import TopKSAE, TopKSAEConfig
from taxolens.hooks.models.load import load_vision_model
from taxolens.plugin.evaluation.bench import Bench, HeldOutActivations, SAELatents
from taxolens.plugin.evaluation.evaluate import choose_evaluators
from taxolens.plugin.evaluation.sae_folders import SAEFolder
from taxolens.plugin.evaluation.settings import EvaluationSettings
from taxolens.plugin.evaluation.split import Split
from taxolens.registry.architectures.parts import sparse_step
from tiny_runs import run_settings, save_sae
from torch import Tensor

D, M = 6, 40


@pytest.fixture(autouse=True)
def sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_step, "runs_on", lambda device: True)


def weights(trained: Any) -> dict[str, Tensor]:
    """Every tensor of the SAE of a run, or of its SAEs, on the CPU."""
    saes = trained if isinstance(trained, dict) else {"": trained}
    return {
        f"{name} {key}": value.detach().cpu()
        for name, sae in saes.items()
        for key, value in sae.state_dict().items()
    }


@pytest.mark.parametrize("kind", ["single", "multi"])
@pytest.mark.parametrize("what", ["the SAE", "all"])
def test_a_run_trains_the_same_weights(
    training: Any, vit_folder: Path, kind: str, what: str
) -> None:
    make = getattr(training, kind)
    near = weights(training.runner(make()).run())
    with FarDevice():
        if what == "all":
            settings = {"device": DEVICE.type, "act_store_device": DEVICE.type}
            model = {"override_model": load_vision_model(vit_folder, device=DEVICE)}
        else:
            settings, model = {"device": DEVICE.type}, {}
        trained = training.runner(make(**settings), **model).run()
        some = trained["first"] if kind == "multi" else trained
        assert some.W_dec.device == DEVICE
        far = weights(trained)
    torch.testing.assert_close(far, near, rtol=1e-3, atol=1e-4)


def test_every_number_and_null_is_that_of_the_cpu() -> None:
    taxonomy = tree((2, 2, 3))
    n_classes = len(taxonomy.classes)
    labels = np.repeat(np.arange(n_classes), 8)
    generator = np.random.default_rng(0)
    of_class = generator.normal(size=(n_classes, 1, D))
    tokens = (of_class[labels] + 0.3 * generator.normal(size=(len(labels), 1, D))).astype("f4")
    split = Split.halves(labels, n_classes, 1)
    held_out = HeldOutActivations(tokens, split, tokens[:, 0] * 2, tokens[:, 0] + 4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sae = TopKSAE(TopKSAEConfig(d_in=D, d_sae=M, k=4)).eval()
        torch.nn.init.normal_(sae.W_enc)
        torch.nn.init.normal_(sae.W_dec)
    options = {"meta_sae": {"steps": 5}, "hyperbolicity": {"max_points": 40}}
    chosen = choose_evaluators(list(taxolens.EVALUATORS), options)

    def measured(device: str) -> tuple[dict[str, Any], dict[str, str]]:
        settings = EvaluationSettings(n_permutations=3, n_twins=2, n_groups=0, device=device)
        bench = Bench(taxonomy, chosen, settings)
        latents = SAELatents(sae.to(device))
        nulls: dict[str, Any] = {}
        for null, sources in bench.null_sources(latents, held_out).items():
            assert not isinstance(sources, str), sources
            for source in sources:
                done = bench.numbers(source, held_out, bench.chosen_for(null))
                nulls.setdefault(null, []).append(done)
        done = bench.run(latents, held_out)
        found = bench.metrics(done, nulls)
        for name in chosen:
            assert done.attempt(name, lambda evaluator: (evaluator.tables(), evaluator.figures()))
        return found, done.errors

    near, errors = measured("cpu")
    assert not errors
    with FarDevice():
        far, errors = measured(DEVICE.type)
    assert not errors
    for evaluator, numbers in near.items():
        for metric, number in numbers.items():
            other = far[evaluator][metric]
            where = f"{evaluator} {metric}"
            assert other.value == pytest.approx(number.value, rel=1e-3, abs=1e-5, nan_ok=True), (
                where
            )
            for null, draws in number.nulls.items():
                wanted = pytest.approx(draws.mean, rel=1e-3, abs=1e-5, nan_ok=True)
                assert other.nulls[null].mean == wanted, f"{where} {null}"


def test_evaluators_that_run_the_model_have_the_numbers_of_the_cpu(
    vit: Any, vit_folder: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = "blocks.0.hook_resid_post"
    save_sae(tmp_path / "sae", hook, run_settings(vit_folder, world))

    def evaluated(device: Any, model: Any) -> Any:
        output = tmp_path / str(device)
        names = [n for n, cls in taxolens.EVALUATORS.items() if cls.wants_intervention]
        settings = {"n_permutations": 2, "n_groups": 0, "progress": False, "evaluators": names}
        results = taxolens.evaluate_run(
            tmp_path / "sae",
            override_model=model,
            device=str(device),
            output_path=output,
            **settings,
        )
        assert not results.errors
        return results.frame()

    near = evaluated("cpu", vit)
    load = SAEFolder.load  # of a file; the simulated device reads none
    monkeypatch.setattr(SAEFolder, "load", lambda folder, device="cpu": load(folder).to(device))
    with FarDevice():
        far = evaluated(DEVICE, load_vision_model(vit_folder, device=DEVICE))
    assert len(near) and list(near) == list(far)
    for column in ("value", "permuted_classes", "shuffled", "random", "neurons"):
        wanted = near[column].astype(float)
        np.testing.assert_allclose(far[column].astype(float), wanted, 1e-3, 1e-5, err_msg=column)
