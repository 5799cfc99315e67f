"""Runs and evaluations on a device beside the CPU, CUDA and simulated: the same weights and numbers.

A tensor on the wrong device is an error on both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import taxolens
import torch
from far_device import FAR_DEVICES, is_far, on
from results_factory import tree
from sae_lens import TopKSAE, TopKSAEConfig
from taxolens.hooks.models.load import load_vision_model
from taxolens.plugin.evaluation.bench import Bench, HeldOutActivations, SAELatents
from taxolens.plugin.evaluation.evaluate import choose_evaluators
from taxolens.plugin.evaluation.sae_folders import SAEFolder
from taxolens.plugin.evaluation.settings import EvaluationSettings
from taxolens.plugin.evaluation.split import Split
from tiny_runs import run_settings, save_sae
from torch import Tensor

D, M = 6, 40


far_devices = pytest.mark.parametrize("device", FAR_DEVICES)


def weights(trained: Any) -> dict[str, Tensor]:
    """Every tensor of the SAE of a run, or of its SAEs, on the CPU."""
    saes = trained if isinstance(trained, dict) else {"": trained}
    return {
        f"{name} {key}": value.detach().cpu()
        for name, sae in saes.items()
        for key, value in sae.state_dict().items()
    }


@far_devices
@pytest.mark.parametrize("kind", ["single", "multi"])
@pytest.mark.parametrize("what", ["the SAE", "all"])
def test_a_run_trains_the_same_weights(
    training: Any, vit_folder: Path, device: str, kind: str, what: str
) -> None:
    make = getattr(training, kind)
    near = weights(training.runner(make()).run())
    with on(device):
        if what == "all":
            settings = {"device": device, "act_store_device": device}
            model = {"override_model": load_vision_model(vit_folder, device=device)}
        else:
            settings, model = {"device": device}, {}
        trained = training.runner(make(**settings), **model).run()
        some = trained["first"] if kind == "multi" else trained
        assert some.W_dec.device.type == device
        far = weights(trained)
    torch.testing.assert_close(far, near, rtol=1e-3, atol=1e-4)


@far_devices
def test_every_number_and_null_is_that_of_the_cpu(device: str) -> None:
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
    with on(device):
        far, errors = measured(device)
    assert not errors
    within = {"rel": 1e-3, "abs": 1e-5 if is_far(device) else 1e-4, "nan_ok": True}
    for evaluator, numbers in near.items():
        for metric, number in numbers.items():
            other = far[evaluator][metric]
            where = f"{evaluator} {metric}"
            assert other.value == pytest.approx(number.value, **within), where
            for null, draws in number.nulls.items():
                wanted = pytest.approx(draws.mean, **within)
                assert other.nulls[null].mean == wanted, f"{where} {null}"


@far_devices
@pytest.mark.parametrize("which", ["default", "that run the model"])
def test_an_evaluation_has_the_numbers_of_the_cpu(
    vit: Any,
    vit_folder: Path,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    which: str,
) -> None:
    hook = "blocks.0.hook_resid_post"
    save_sae(tmp_path / "sae", hook, run_settings(vit_folder, world))

    names = [n for n, cls in taxolens.EVALUATORS.items() if cls.wants_intervention]
    settings = {"n_permutations": 2, "n_groups": 0, "progress": False}
    settings["evaluators"] = None if which == "default" else names

    def evaluated(device: str, model: Any) -> Any:
        results = taxolens.evaluate_run(
            tmp_path / "sae",
            override_model=model,
            device=device,
            output_path=tmp_path / device,
            **settings,
        )
        assert not results.errors
        return results.frame()

    near = evaluated("cpu", vit)
    if is_far(device):
        load = SAEFolder.load  # of a file; the simulated device reads none
        monkeypatch.setattr(SAEFolder, "load", lambda folder, device="cpu": load(folder).to(device))
    with on(device):
        far = evaluated(device, load_vision_model(vit_folder, device=device))
    assert len(near) and list(near) == list(far)
    for column in ("value", "permuted_classes", "shuffled", "random", "neurons"):
        wanted = near[column].astype(float)
        found = far[column].astype(float)
        atol = 1e-5 if is_far(device) else 1e-4
        np.testing.assert_allclose(found, wanted, 1e-3, atol, err_msg=column)
