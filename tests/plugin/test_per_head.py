"""SAEs of single heads, from training to results: against slices made by hand."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import SAE
from sae_lens.training.sae_trainer import SAETrainer
from taxolens.hooks.activations.stream import ActivationStream
from taxolens.hooks.images.dataset import ImageDataset
from taxolens.plugin import cli
from taxolens.plugin.evaluation.evaluate import evaluate_run
from taxolens.plugin.evaluation.peers import find_peers
from taxolens.plugin.evaluation.sae_folders import find_saes
from taxolens.plugin.reporting.report import write_report
from taxolens.plugin.reporting.results import Results
from taxolens.plugin.reporting.series import all_series
from taxolens.plugin.study.settings import gather
from taxolens.plugin.training.config import (
    VisionMultiSAERunnerConfig,
    VisionSAERunnerConfig,
    sae_config_for_hook,
)
from taxolens.plugin.training.rng import seeded
from taxolens.plugin.training.runner import new_sae
from taxolens.plugin.training.step_choice import fuse_optimizer
from taxolens.registry.errors import CheckpointError, ConfigError
from test_evaluate import FAST, save_sae
from tiny_runs import run_settings

Z = "blocks.0.attn.hook_z"
D_HEAD = 8
HEADS = {0: slice(0, 8), 1: slice(8, 16)}


def by_hand(training: Any, vit: Any, images: ImageDataset, columns: slice, **settings: Any) -> Any:
    """SAELens's trainer on columns of the hook point's activations."""
    cfg = training.single(hook_name=Z, sae=training.sae(D_HEAD), **settings)
    stream = ActivationStream(
        *(vit, images, [Z]),
        tokens=cfg.tokens,
        seed=cfg.seed,
        train_batch_size_tokens=cfg.train_batch_size_tokens,
        store_batch_size_prompts=cfg.store_batch_size_prompts,
        n_batches_in_buffer=cfg.n_batches_in_buffer,
    )
    batches = (batch[Z][:, columns] for batch in stream)
    sae = new_sae(cfg.sae, cfg.seed)
    trainer_cfg = cfg.to_sae_trainer_config()
    trainer_cfg.n_checkpoints, trainer_cfg.checkpoint_path = 0, None
    with seeded(cfg.seed):
        trainer = SAETrainer(trainer_cfg, sae, batches, lambda *args: {})
        fuse_optimizer(trainer.optimizer)  # as in a run
        return trainer.fit().state_dict()


def same(found: Any, expected: dict[str, torch.Tensor]) -> bool:
    weights = found.state_dict()
    return all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("tokens", ["class", "patch"])
def test_an_sae_is_trained_on_its_head_alone(
    tokens: str, training: Any, vit: Any, images: Any
) -> None:
    settings = {"hook_name": Z, "hook_head_index": 1, "tokens": tokens, "sparse_step": False}
    cfg = training.single(sae=training.sae(D_HEAD), **settings)
    sae = training.runner(cfg).run()
    assert same(sae, by_hand(training, vit, images, HEADS[1], tokens=tokens))
    assert not same(sae, by_hand(training, vit, images, HEADS[0], tokens=tokens))
    metadata = SAE.load_from_disk(training.output).cfg.metadata
    assert (metadata.hook_name, metadata.hook_head_index) == (Z, 1)
    again = VisionSAERunnerConfig.load(training.output / "runner_cfg.json")
    assert again.hook_head_index == 1


@pytest.mark.parametrize("cached", [False, True])
def test_heads_of_one_hook_point_are_trained_together(
    cached: bool, training: Any, vit: Any, images: Any, tmp_path: Path
) -> None:
    cache = {"use_cached_activations": True, "cached_activations_path": str(tmp_path / "cache")}
    cfg = training.multi(
        saes={"a": training.sae(D_HEAD), "b": training.sae(D_HEAD), "c": training.sae()},
        hook_names={"a": Z, "b": Z, "c": "blocks.1.hook_resid_post"},
        hook_head_indices={"a": 1, "b": 0},
        sparse_step=False,  # SAELens's own step, as by hand
        **(cache if cached else {}),
    )
    assert cfg.hook_head_indices_per_sae == {"a": 1, "b": 0, "c": None}
    runner = training.runner(cfg)
    saes = runner.run()
    for name, head in (("a", 1), ("b", 0)):
        alone = training.single(
            hook_name=Z,
            hook_head_index=head,
            sae=training.sae(D_HEAD),
            output_path=str(tmp_path / name),
            checkpoint_id=name,
            sparse_step=False,
            **(cache if cached else {}),
        )
        if cached:
            alone.cached_activations_path = str(tmp_path / "cache")
        assert same(saes[name], training.runner(alone).run().state_dict())
        if not cached:
            assert same(saes[name], by_hand(training, vit, images, HEADS[head]))
        assert SAE.load_from_disk(training.output / name).cfg.metadata.hook_head_index == head
    assert SAE.load_from_disk(training.output / "c").cfg.metadata.hook_head_index is None
    again = VisionMultiSAERunnerConfig.load(training.output / "runner_cfg.json")
    assert again.hook_head_indices == {"a": 1, "b": 0}
    if cached:
        index = json.loads((tmp_path / "cache" / "cache.json").read_text())
        assert index["facts"]["hook_names"] == [Z, "blocks.1.hook_resid_post"]
        assert np.load(tmp_path / "cache" / f"{Z}.npy").shape == (10, 1, 16)


def test_a_run_of_heads_is_resumed_to_the_bit_and_never_by_another_head(training: Any) -> None:
    def config(**changes: Any) -> Any:
        saes = {"a": training.sae(D_HEAD), "b": training.sae(D_HEAD)}
        return training.multi(
            saes=saes, hook_names=Z, **{"hook_head_indices": {"a": 1, "b": 0}, **changes}
        )

    whole = training.runner(config(n_checkpoints=2)).run()
    there = sorted(training.checkpoints.iterdir(), key=lambda path: int(path.name))[0]
    resumed = training.runner(config(resume_from_checkpoint=str(there))).run()
    assert all(same(resumed[name], whole[name].state_dict()) for name in whole)
    swapped = config(resume_from_checkpoint=str(there), hook_head_indices={"a": 0, "b": 1})
    with pytest.raises(CheckpointError, match="hook_head_index"):
        training.runner(swapped)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hook_head_index": 2}, r"hook_head_index: '.*hook_z' has 2 heads; given 2; allowed: 0 to 1"),
        ({"hook_head_index": 1, "d_in": 16}, r"sae.d_in: not the width of a head at .*; given 16; allowed: 8"),
        ({"hook_head_index": 0, "hook_name": "blocks.0.hook_resid_post"}, r"'blocks.0.hook_resid_post' of .* has no heads"),
        ({}, r"sae.d_in: not the width at blocks.0.attn.hook_z; given 8; allowed: 16"),
        ({"hook_head_index": -1}, r"hook_head_index: not possible; given -1; allowed: an integer, 0 or more"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_the_images_are_read(
    training: Any, changes: dict[str, Any], message: str
) -> None:
    changes = {"hook_name": Z, **changes}
    with pytest.raises(ConfigError, match=message):
        cfg = training.single(
            sae=training.sae(changes.pop("d_in", D_HEAD)), dataset_path="no/where", **changes
        )
        training.runner(cfg, override_dataset=None)


def test_a_head_of_an_sae_that_does_not_exist(training: Any) -> None:
    with pytest.raises(ConfigError, match=r"hook_head_indices of SAE: not known; given 'thrid'"):
        training.multi(hook_head_indices={"thrid": 0})
    with pytest.raises(ConfigError, match=r"hook_head_indices: not possible; given '0'"):
        training.multi(hook_head_indices={"first": "0"})


def test_the_width_of_a_head_is_filled_in(training: Any, vit: Any) -> None:
    assert sae_config_for_hook(vit, Z, training.sae(1), hook_head_index=1).d_in == D_HEAD
    assert sae_config_for_hook(vit, Z, training.sae(1)).d_in == 16


# The command line ---------------------------------------------------------------------------------


def flags(vit_folder: Path, world: Path, output: Path) -> list[str]:
    """A run of a second, as typed."""
    return [
        *("--model_name", str(vit_folder), "--dataset_path", str(world), "--no_evaluate"),
        *("--architecture", "topk", "--k", "4", "--d_sae", "24", "--training_tokens", "64"),
        *("--train_batch_size_tokens", "8", "--output_path", str(output)),
        *("--checkpoint_path", str(output / "checkpoints"), "--log_to_wandb", "false"),
    ]


def test_the_flags_of_one_head_and_of_several(
    vit_folder: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = flags(vit_folder, world, tmp_path / "one")
    assert cli.main(["train", *own, "--hook_name", Z, "--hook_head_index", "1"]) == 0
    sae = SAE.load_from_disk(tmp_path / "one")
    assert (sae.cfg.d_in, sae.cfg.metadata.hook_head_index) == (D_HEAD, 1)
    several = [*flags(vit_folder, world, tmp_path / "many"), "--hook_names", "blocks.*.attn.hook_z"]
    assert cli.main(["train", *several, "--hook_head_indices", "0", "1"]) == 0
    found = find_saes(tmp_path / "many")
    assert [(sae.name, sae.hook_name, sae.head) for sae in found] == [
        (f"blocks.{block}.attn.hook_z.head{head}", f"blocks.{block}.attn.hook_z", head)
        for block, head in itertools.product((0, 1), (0, 1))
    ]
    assert all(sae.cfg["d_in"] == D_HEAD for sae in found)
    capsys.readouterr()
    own[own.index(str(tmp_path / "one"))] = str(tmp_path / "none")
    assert cli.main(["train", *own, "--hook_name", Z, "--hook_head_index", "2"]) == 2
    assert "has 2 heads; given 2; allowed: 0 to 1" in capsys.readouterr().err


def test_one_replaces_the_other() -> None:
    base = {"model_name": "m", "dataset_path": "d", "hook_name": Z, "d_sae": 8}
    assert gather(flags={**base, "hook_head_index": 0}).heads == (0,)
    assert gather(flags={**base, "hook_head_indices": [0, 2, 0]}).heads == (0, 2)
    assert gather(flags=base).heads == (None,)
    with pytest.raises(ConfigError, match="hook_head_index and hook_head_indices"):
        gather(flags={**base, "hook_head_index": 0, "hook_head_indices": [1]})


# Evaluation ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(vit_folder: Path, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SAEs of two heads of two blocks, and one of both heads joined."""
    folder = tmp_path_factory.mktemp("runs") / "heads"
    settings = run_settings(vit_folder, world, eval_split="validation")
    for block, head in itertools.product((0, 1), (0, 1)):
        hook = f"blocks.{block}.attn.hook_z"
        own = {**settings, "hook_head_index": head}
        save_sae(folder / f"{hook}.head{head}", hook, own, seed=head, d_in=D_HEAD)
    save_sae(folder / "joined", Z, settings)
    (folder / "runner_cfg.json").write_text(json.dumps(settings))
    return folder


EVALUATORS = ["reconstruction", "detection", "stability", "pair_depth"]


@pytest.fixture(scope="module")
def results(run: Path, vit: Any, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return evaluate_run(
        run,
        **{**FAST, "evaluators": EVALUATORS},
        override_model=vit,
        output_path=tmp_path_factory.mktemp("results"),
    )


def test_heads_are_in_the_results_and_the_report(results: Results) -> None:
    assert results.errors == {} and results.complete
    report = write_report(results, interactive=False).read_text()
    again = Results.load(results.folder)
    assert [sae.hook_head_index for sae in again.saes] == [0, 1, 0, 1, None]
    for sae in again.saes:
        head = sae.name.rpartition("head")[2]
        assert sae.hook_head_index == (int(head) if head.isdigit() else None)
        assert sae.id in report


def test_an_evaluation_reads_the_head(results: Results, run: Path, vit: Any, world: Path) -> None:
    from taxolens.hooks.images.dataset import load_images
    from taxolens.hooks.images.preprocess import preprocess_for
    from taxolens.hooks.models.load import run_to_hooks

    images = load_images(world, split="validation")
    preprocess = preprocess_for(vit)
    pixels = torch.stack(
        [torch.from_numpy(preprocess(images.decode(i))) for i in range(len(images))]
    )
    for sae in results.saes:
        loaded = SAE.load_from_disk(run / sae.name)
        x = run_to_hooks(vit, pixels, [sae.hook_name])[sae.hook_name][:, 0]
        if sae.hook_head_index is not None:
            x = x[:, HEADS[sae.hook_head_index]]
        fires = (loaded.encode(x) > 0).sum(1).double().mean()
        assert sae.l0 == pytest.approx(float(fires)), sae.name


def test_series_and_peers_keep_heads_apart(results: Results, run: Path) -> None:
    series = [[(sae.layer, sae.hook_head_index) for sae in one] for one in all_series(results)]
    assert sorted(series, key=str) == [[(0, 0), (1, 0)], [(0, 1), (1, 1)], [(0, None)]]
    saes = find_saes(run)
    found = {sae.name: [(o.name, r) for o, r in find_peers(sae, saes)] for sae in saes}
    assert found[f"{Z}.head1"] == [("blocks.1.attn.hook_z.head1", "layer")]
    assert found["blocks.1.attn.hook_z.head0"] == [(f"{Z}.head0", "layer")]
    heads = [sae for sae in saes if sae.name in (f"{Z}.head0", f"{Z}.head1")]
    assert len(heads) == 2 and all(find_peers(sae, heads) == [] for sae in heads)


def test_a_head_can_be_given_to_an_evaluation(
    run: Path, vit: Any, results: Results, tmp_path: Path
) -> None:
    """As for an SAE made elsewhere, whose config has no head."""
    there = run / f"{Z}.head1"
    folder = tmp_path / "sae"
    folder.mkdir()
    for file in there.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    cfg = json.loads((folder / "cfg.json").read_text())
    del cfg["metadata"]["hook_head_index"]
    (folder / "cfg.json").write_text(json.dumps(cfg))
    settings = {**FAST, "evaluators": ["pair_depth"], "override_model": vit}
    with pytest.raises(ConfigError, match=r"d_in: not the width of blocks\.0\.attn\.hook_z of"):
        evaluate_run(folder, output_path=tmp_path / "out", **settings)
    found = evaluate_run(folder, output_path=tmp_path / "out", hook_head_index=1, **settings)
    expected = next(sae for sae in results.saes if sae.name == f"{Z}.head1")
    name = "pair_depth"
    assert {k: m.value for k, m in found.saes[0].evaluators[name].metrics.items()} == pytest.approx(
        {k: m.value for k, m in expected.evaluators[name].metrics.items()}, nan_ok=True
    )
    with pytest.raises(ConfigError, match="has 2 heads; given 7"):
        evaluate_run(folder, output_path=tmp_path / "out7", hook_head_index=7, **settings)
