"""SAEs that are dealt to the processes of a job end in the bits of one process."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import wandb
from sae_lens import (
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAEConfig,
    LoggingConfig,
    MatryoshkaBatchTopKTrainingSAEConfig,
    TopKTrainingSAEConfig,
)
from sae_lens.saes.sae import TrainingSAE
from safetensors.torch import load_file
from taxolens.hooks.images.dataset import load_images
from taxolens.hooks.models.load import load_vision_model
from taxolens.plugin.training import dealing, resumable_session
from taxolens.plugin.training.checkpoints import checkpoints_in, is_whole, read_manifest
from taxolens.plugin.training.interrupts import TrainingInterrupted
from taxolens.plugin.training.lockstep import SharedInterrupts
from taxolens.plugin.training.rng import draw_by_step, seeded
from taxolens.plugin.training.runner import new_sae
from taxolens.registry.architectures.mp import MPTrainingSAEConfig
from taxolens.registry.architectures.random_matryoshka import RandomMatryoshkaTrainingSAEConfig
from taxolens.registry.errors import ConfigError, DataError, DivergedError, LostRankError
from taxolens.registry.files import file_digest
from taxolens.registry.ranks import Ranks
from thread_ranks import run_job
from wandb_reader import OfflineRun

SIZE = {"d_in": 16, "d_sae": 32}
HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
# Between them: random numbers of an architecture, an estimated normalization that the others do not need,
# a soft constraint, and a pursuit, which the dealing counts as more expensive.
SAES = {
    "topk": lambda: TopKTrainingSAEConfig(**SIZE, k=4),
    "random_matryoshka": lambda: RandomMatryoshkaTrainingSAEConfig(**SIZE, k=4),
    "batchtopk": lambda: BatchTopKTrainingSAEConfig(
        **SIZE, k=4, normalize_activations="expected_average_only_in"
    ),
    "soft": lambda: TopKTrainingSAEConfig(**SIZE, k=4),
    "mp": lambda: MPTrainingSAEConfig(**SIZE, k=4, atom_dropout=0.1),
}
SETTINGS = {
    "hook_names": {name: HOOKS[index % 2] for index, name in enumerate(SAES)},
    "constraint": {"soft": "soft_frozen_decoder"},
    "n_checkpoints": 2,
    "dead_feature_window": 2,
    "feature_sampling_window": 4,
    "lr_warm_up_steps": 3,
    "lr": 0.2,
    "n_batches_for_norm_estimate": 3,
}


def digests(folder):
    """SHA-256 of every file of every SAE."""
    files = sorted(path for path in folder.rglob("*") if path.parent.name in SAES)
    assert files
    return {f"{path.relative_to(folder)}": file_digest(path) for path in files}


@pytest.fixture(autouse=True)
def one_thread():
    """As torchrun sets it: sums of several threads are taken in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def job(training, vit_folder, photos):
    """Runs a job of some ranks, and returns what each rank ended with."""

    def run(size, name, saes=SAES, photos=photos, **changes):
        settings = {**SETTINGS, "output_path": str(training.folder / name), **changes}

        def runner():
            cfg = training.multi(saes={name: make() for name, make in saes.items()}, **settings)
            # Threads must not share a model: its hooks are set while it runs.
            overrides = {"override_model": load_vision_model(vit_folder)}
            return training.runner(cfg, override_dataset=load_images(photos), **overrides)

        return run_job(size, runner)

    return run


def trained(ended):
    """The names of the SAEs that each rank has trained."""
    errors = [each for each in ended if isinstance(each, BaseException)]
    for error in sorted(errors, key=lambda error: isinstance(error, LostRankError)):
        raise error
    return [sorted(each) for each in ended]


@pytest.mark.parametrize(
    ("tokens", "cached"), [("class", False), ("patch", False), ("patch", True)]
)
def test_any_number_of_ranks_trains_the_same_bits(job, training, tokens, cached):
    settings = {"tokens": tokens, "use_cached_activations": cached, "prefetch_llm_batches": 2}
    settings["cached_activations_path"] = str(training.folder / "activations")
    trained(job(1, "alone", checkpoint_id="alone", **settings))
    expected = digests(training.folder / "alone")
    whole = checkpoints_in(training.folder / "checkpoints" / "alone")
    assert {name.split("/")[0] for name in expected} == set(SAES)
    for size in (2, 3, 6):
        name = f"of_{size}"
        shares = trained(job(size, name, checkpoint_id=name, **settings))
        assert sorted(name for share in shares for name in share) == sorted(SAES)
        assert sum(bool(share) for share in shares) == min(size, len(SAES))
        assert digests(training.folder / name) == expected
        assert (training.folder / name / "runner_cfg.json").exists()
        found = checkpoints_in(training.folder / "checkpoints" / name)
        for checkpoint, one in zip(found, whole, strict=True):
            assert is_whole(checkpoint)
            assert read_manifest(checkpoint).run == read_manifest(one).run
            files, others = read_manifest(checkpoint).files, read_manifest(one).files
            assert list(files) == list(others)
            differing = {n for n in files if files[n].sha256 != others[n].sha256}
            assert differing <= {"runner_cfg.json"}  # which has the folders of its run


@pytest.mark.parametrize("cached", [False, True])
def test_a_run_goes_on_with_another_number_of_ranks(job, training, cached):
    settings = {"tokens": "patch", "use_cached_activations": cached}
    settings["cached_activations_path"] = str(training.folder / "activations")
    trained(job(3, "first", **settings))
    expected = digests(training.folder / "first")
    for size in (1, 2, 6):
        for checkpoint in checkpoints_in(training.checkpoints):
            name = f"again_{size}_{checkpoint.name}"
            trained(job(size, name, resume_from_checkpoint=str(checkpoint), **settings))
            assert digests(training.folder / name) == expected


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("at", [0, 4])
def test_a_signal_to_one_rank_stops_all_at_one_step(job, training, monkeypatch, cached, at):
    """Before the first step, in the estimate of norms that one rank needs, and later."""
    settings = {"use_cached_activations": cached, "n_checkpoints": 0}
    settings["cached_activations_path"] = str(training.folder / "activations")
    trained(job(2, "whole", checkpoint_id="whole", **settings))

    class Signalled(SharedInterrupts):
        """The second rank receives SIGTERM at its n-th step, counted without the estimate."""

        def check(self):
            self.calls = getattr(self, "calls", 0) + 1
            if self._ranks.rank == 1 and self.calls == 2 * at + 2:
                self.received = signal.SIGTERM
            super().check()

    with monkeypatch.context() as patch:
        patch.setattr(resumable_session, "SharedInterrupts", Signalled)
        ended = job(6, "stopped", **settings)
    assert all(isinstance(each, TrainingInterrupted) for each in ended), ended
    (message,) = {str(each) for each in ended}
    assert message.startswith("SIGTERM: training stopped after ")
    (checkpoint,) = checkpoints_in(training.checkpoints)
    assert is_whole(checkpoint) and str(checkpoint) in message
    trained(job(3, "stopped", resume_from_checkpoint="auto", **settings))
    assert digests(training.folder / "stopped") == digests(training.folder / "whole")


def test_corrupt_images_are_counted_as_one_process_counts_them(job, training, photos, tmp_path):

    folder = shutil.copytree(photos, tmp_path / "photos")
    for name in ("cat/2.png", "dog/5.png"):
        (folder / name).write_bytes(b"no picture")
    settings = {"photos": folder, "dataset_path": str(folder), "store_batch_size_prompts": 1}
    states = []
    for size in (1, 3):
        name = f"of_{size}"
        trained(job(size, name, checkpoint_id=name, **settings))
        (checkpoint, _) = checkpoints_in(training.folder / "checkpoints" / name)
        states.append((checkpoint / "activations_store_state.json").read_text())
    assert digests(training.folder / "of_3") == digests(training.folder / "of_1")
    assert states[0] == states[1] and "2.png" in states[0]


def test_too_many_corrupt_images_stop_every_rank_with_a_checkpoint(
    job, training, photos, tmp_path, monkeypatch
):

    folder = shutil.copytree(photos, tmp_path / "photos")
    (folder / "cat/2.png").write_bytes(b"no picture")
    monkeypatch.setattr("taxolens.hooks.images.loader.MIN_IMAGES", 8)
    settings = {"photos": folder, "dataset_path": str(folder), "checkpoint_id": "run"}
    settings |= {
        "n_checkpoints": 0,
        "max_corrupt_share": 0.0,
        "n_batches_for_norm_estimate": 1,
        "saes": {"topk": SAES["topk"]},
    }
    settings |= {"hook_names": HOOKS[0], "constraint": None, "store_batch_size_prompts": 2}
    found = []
    for size in (1, 2):
        settings["checkpoint_id"] = f"of_{size}"
        ended = job(size, "none", **settings)
        assert all(isinstance(each, DataError | LostRankError) for each in ended), ended
        assert isinstance(ended[0], DataError)
        found.append(
            (
                str(ended[0]),
                *(
                    path.name
                    for path in checkpoints_in(training.folder / "checkpoints" / f"of_{size}")
                ),
            )
        )
    assert found[0] == found[1] and len(found[0]) == 2


def test_a_rank_that_fails_ends_the_job_and_its_error_is_named(job, training, monkeypatch):
    def diverge(session, thorough=False):
        if session.ranks.rank == 1 and session._trainer.n_training_samples >= 32:
            raise DivergedError("SAE 'mp'", "diverged")

    monkeypatch.setattr(resumable_session.TrainingSession, "_check_finite", diverge)
    ended = job(3, "failed", n_checkpoints=1)
    assert isinstance(ended[1], DivergedError)
    assert isinstance(ended[0], LostRankError) and isinstance(ended[2], LostRankError)
    assert not any(is_whole(path) for path in checkpoints_in(training.checkpoints))
    assert not (training.folder / "failed" / "runner_cfg.json").exists()


def test_an_sae_of_one_rank_that_diverges_at_the_end_costs_no_other(job, training, monkeypatch):
    def diverge(session, thorough):
        own = thorough and "mp" in session.saes
        return {"mp": DivergedError("SAE 'mp'", "diverged")} if own else {}

    monkeypatch.setattr(resumable_session.TrainingSession, "_not_finite", diverge)
    ended = job(2, "but_one", save_final_checkpoint=True, n_checkpoints=0)
    (message,) = {f"{type(each).__name__} {each}" for each in ended}
    assert message.startswith("DivergedError output_path: '")
    assert message.endswith("but_one' holds the other SAEs alone. SAE 'mp': diverged.")
    written = {path.parent.name for path in (training.folder / "but_one").glob("*/cfg.json")}
    assert written == set(SAES) - {"mp"}


def test_an_output_that_one_rank_cannot_write_is_an_error_of_all(job, training, monkeypatch):
    def full(self, path):
        if self.cfg.architecture() == "mp" and "full" in str(path):
            raise OSError(28, "No space left on device")
        return save(self, path)

    save = TrainingSAE.save_inference_model
    monkeypatch.setattr(TrainingSAE, "save_inference_model", full)
    ended = job(2, "full")
    (message,) = {f"{type(each).__name__} {each}" for each in ended}
    assert message.startswith("CheckpointError output_path") and "No space left" in message
    assert not (training.folder / "full" / "runner_cfg.json").exists()


def test_an_expensive_architecture_has_a_rank_of_its_own():
    saes = {"omp": _Sized("omp"), **{f"topk_{i}": _Sized("topk") for i in range(6)}}
    found = dealing.owners(Ranks(0, 2), saes)
    assert [name for name, rank in found.items() if rank == 0] == ["omp"]
    assert dealing.cost(_Sized("omp")) > 6 * dealing.cost(_Sized("topk"))
    assert dealing.cost(_Sized("unknown")) == 16 * 32


class _Sized:
    """What the dealing reads of a config."""

    d_in, d_sae = 16, 32

    def __init__(self, architecture):
        self.architecture = lambda: architecture


def test_what_is_drawn_in_a_step_depends_on_seed_and_step_alone():
    class Trainer:
        n_training_steps = 0
        sae = SimpleNamespace(device=torch.device("cpu"))

        def step(self, batch):
            return torch.rand(3)

    def drawn(seed, steps):
        trainer, found = Trainer(), []
        draw_by_step(trainer, seed)
        for trainer.n_training_steps in steps:
            torch.rand(int(torch.randint(5, ())))  # what others draw between two steps
            found.append(trainer.step(None))
        return torch.stack(found)

    with seeded(0):
        expected = drawn(7, range(4))
        assert torch.equal(drawn(7, [2, 3]), expected[2:])
        assert len(expected.unique()) == expected.numel()
        assert not torch.isin(drawn(8, range(4)), expected).any()


SCRIPT = """
import signal, sys
from pathlib import Path
from taxolens.hooks.images.dataset import load_images
from taxolens.hooks.models.load import load_vision_model
from taxolens.plugin.training.interrupts import TrainingInterrupted
from taxolens.registry.ranks import Ranks
from test_ranks_training import LOGGED, SAES, SETTINGS
from tiny_runs import make_training

vit_folder, photos, folder = map(Path, sys.argv[1:])
vit, images, ranks = load_vision_model(vit_folder), load_images(photos), Ranks.here()
training = make_training(vit, vit_folder, photos, images, folder)
with ranks.joined():
    for name, changes in (
        ("live", {}),
        ("cached", {"use_cached_activations": True}),
        ("resumed", {"resume_from_checkpoint": str(folder / "checkpoints/alone")}),
        ("logged", LOGGED),
        ("stopped", {}),
    ):
        changes = changes | {"tokens": "patch", "checkpoint_id": name, **SETTINGS}
        changes |= {"cached_activations_path": str(folder / "activations")}
        changes |= {"output_path": str(folder / name)}
        cfg = training.multi(saes={name: make() for name, make in SAES.items()}, **changes)
        session = (runner := training.runner(cfg)).session
        if name == "stopped" and ranks.rank == 1:
            session._resample = lambda batch: (
                session.store.n_consumed == 4 and signal.raise_signal(signal.SIGTERM)
            )
        try:
            found = sorted(runner.run())
        except TrainingInterrupted as stop:
            found = str(stop)
        sys.stdout.write(f"{ranks.rank} {name}: {found}\\n")  # whole lines of two processes
"""


def mean_input(sae, data_provider, activation_scaler):
    return {"mean_input": next(data_provider).mean().item()}


LOGGED = {
    "evaluator": mean_input,
    "logger": LoggingConfig(wandb_project="p", wandb_log_frequency=2, eval_every_n_wandb_logs=2),
}


def logs_in(folder):
    """Step -> all that is logged at it, of the one run in a folder of W&B."""
    found = {}
    for row in OfflineRun(folder).history:
        row = {name: value for name, value in row.items() if name not in ("_runtime", "_timestamp")}
        found.setdefault(row.pop("_step"), {}).update(row)
    return found


def test_two_processes_train_the_bits_of_one(training, vit_folder, photos, tmp_path, monkeypatch):
    def run(name, **changes):
        changes |= {"tokens": "patch", "cached_activations_path": str(training.folder / "kept")}
        changes |= {"output_path": str(training.folder / name), **SETTINGS}
        saes = {name: make() for name, make in SAES.items()}
        training.runner(training.multi(saes=saes, checkpoint_id=name, **changes)).run()
        return digests(training.folder / name)

    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "one"))
    expected, from_cache = run("alone", **LOGGED), run("alone_cached", use_cached_activations=True)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "two"))
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    paths = [str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", script, vit_folder, photos, training.folder],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum("live: [" in line for line in lines) == 2
    for name, wanted in (("live", expected), ("cached", from_cache), ("resumed", expected)):
        assert digests(training.folder / name) == wanted, name
    logs, wanted = logs_in(tmp_path / "two"), logs_in(tmp_path / "one")
    assert {step: sorted(row) for step, row in logs.items()} == {
        step: sorted(row) for step, row in wanted.items()
    }
    assert logs == wanted
    named = {name.partition("/")[0] for row in logs.values() for name in row}
    assert named >= set(SAES) and "mp/mean_input" in logs[3] and "soft/metrics/l0" in logs[1]
    (stop,) = {line.partition("stopped: ")[2] for line in lines if "stopped: " in line}
    assert "SIGTERM: training stopped after" in stop
    (checkpoint, *_) = checkpoints_in(training.folder / "checkpoints/stopped")
    run("stopped", resume_from_checkpoint=str(checkpoint))
    assert digests(training.folder / "stopped") == expected


ONE = {
    "topk": SAES["topk"],
    "batchtopk": lambda: BatchTopKTrainingSAEConfig(
        **SIZE, k=4, normalize_activations="expected_average_only_in", topk_threshold_lr=0.3
    ),
    "jumprelu": lambda: JumpReLUTrainingSAEConfig(
        **SIZE, l0_coefficient=0.5, jumprelu_bandwidth=0.5, jumprelu_init_threshold=0.1
    ),
    "matryoshka_batchtopk": lambda: MatryoshkaBatchTopKTrainingSAEConfig(
        **SIZE, k=4, matryoshka_widths=[8, 32], use_matryoshka_aux_loss=True
    ),
    "mp": SAES["mp"],
}


def run_one(training, vit_folder, photos, size, name, architecture, **changes):
    settings = {name: SETTINGS[name] for name in ("dead_feature_window", "feature_sampling_window")}
    settings |= {"output_path": str(training.folder / name), "checkpoint_id": name, "lr": 0.05}
    settings |= {
        "sae": replace(ONE[architecture](), dtype="float64"),
        "n_checkpoints": 1,
        **changes,
    }

    def runner():
        model = load_vision_model(vit_folder)
        images = load_images(photos)
        return training.runner(
            training.single(**settings), override_model=model, override_dataset=images
        )

    return run_job(size, runner)


@pytest.mark.parametrize("architecture", ONE)
def test_one_sae_of_several_processes_is_that_of_the_joined_batch(
    training, vit_folder, photos, architecture
):
    def run(size, name, **changes):
        return run_one(training, vit_folder, photos, size, name, architecture, **changes)

    (alone,) = run(1, "alone")
    state = alone.state_dict()
    for size in (2, 4):
        name = f"of_{size}"
        ended = run(size, name)
        trained([[] if isinstance(each, TrainingSAE) else each for each in ended])
        for found in ended:
            for key, value in found.state_dict().items():
                assert torch.equal(value, ended[0].state_dict()[key]), key  # on every rank
                assert torch.allclose(value, state[key], rtol=1e-4, atol=1e-6), key
        one, many = (
            load_file(training.folder / n / "sparsity.safetensors") for n in ("alone", name)
        )
        assert torch.equal(one["sparsity"], many["sparsity"])
        (checkpoint,) = checkpoints_in(training.folder / "checkpoints" / name)
        (other,) = checkpoints_in(training.folder / "checkpoints/alone")
        assert is_whole(checkpoint) and checkpoint.name == other.name
        assert read_manifest(checkpoint).files.keys() == read_manifest(other).files.keys()
    ended = run(1, "again", resume_from_checkpoint=str(checkpoint))
    for key, value in ended[0].state_dict().items():
        assert torch.allclose(value, state[key], rtol=1e-4, atol=1e-6), key


@pytest.mark.parametrize("constraint", [None, "soft_frozen_decoder"])
def test_one_sae_starts_from_the_weights_of_the_first_process(
    training, vit_folder, photos, constraint
):
    def run(size, name, seed_of):
        settings = {"output_path": str(training.folder / name), "checkpoint_id": name, "lr": 0.05}
        settings |= {"sae": replace(ONE["topk"](), dtype="float64"), "constraint": constraint}

        def runner():
            cfg = training.single(**settings)
            own = new_sae(cfg.sae, seed_of(Ranks.here().rank))
            overrides = {"override_model": load_vision_model(vit_folder), "override_sae": own}
            return training.runner(cfg, override_dataset=load_images(photos), **overrides)

        ended = run_job(size, runner)
        trained([[] if isinstance(each, TrainingSAE) else each for each in ended])
        return [each.state_dict() for each in ended]

    (alone,) = run(1, "alone", lambda rank: 5)
    first, second = run(2, "of_2", lambda rank: 5 + rank)
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(first[name], value, rtol=1e-4, atol=1e-6), name


def test_a_signal_stops_all_processes_of_one_sae(training, vit_folder, photos, monkeypatch):
    class Signalled(SharedInterrupts):
        def check(self):
            self.calls = getattr(self, "calls", 0) + 1
            if self._ranks.rank == 1 and self.calls == 8:
                self.received = signal.SIGTERM
            super().check()

    def run(size, name, **changes):
        changes = {"n_checkpoints": 0, "checkpoint_id": "run", **changes}
        return run_one(training, vit_folder, photos, size, name, "topk", **changes)

    (alone,) = run(1, "alone", checkpoint_id="alone")
    with monkeypatch.context() as patch:
        patch.setattr(resumable_session, "SharedInterrupts", Signalled)
        ended = run(2, "stopped")
    assert all(isinstance(each, TrainingInterrupted) for each in ended), ended
    (checkpoint,) = checkpoints_in(training.checkpoints)
    assert is_whole(checkpoint) and str(checkpoint) in str(ended[1])
    for found in run(2, "stopped", resume_from_checkpoint="auto"):
        for key, value in found.state_dict().items():
            assert torch.allclose(value, alone.state_dict()[key], rtol=1e-4, atol=1e-6), key


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sae": GatedTrainingSAEConfig(**SIZE)},
            "architecture: gated computes from a batch what 2",
        ),
        ({"train_batch_size_tokens": 7}, "train_batch_size_tokens: 2 processes cannot have equal"),
        ({"compile_sae": True}, "compile_sae: a compiled SAE cannot exchange within a step"),
    ],
)
def test_what_several_processes_cannot_reduce_is_refused(training, monkeypatch, changes, message):
    monkeypatch.setattr(Ranks, "here", classmethod(lambda cls: Ranks(0, 2)))
    with pytest.raises(ConfigError, match=message):
        training.runner(training.single(**changes))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"images": True}, "activations.images: "),
        ({"model": True}, "activations.model: "),
        ({"lr": 0.1}, "lr: 0.2 on rank 0, 0.1 on rank 1"),
        ({"n_checkpoints": 3}, "n_checkpoints: 2 on rank 0, 3 on rank 1"),
        ({"seed": 3}, "activations.seed: 42 on rank 0, 3 on rank 1"),
    ],
)
def test_processes_with_other_work_are_refused_on_each(
    training, vit_folder, photos, tmp_path, cached, changes, named
):
    def runner():
        model, folder, given = load_vision_model(vit_folder), photos, dict(changes)
        if Ranks.here().is_first:
            given = {}
        if given.pop("images", False):  # a copy that lacks one
            folder = shutil.copytree(photos, tmp_path / "photos")
            (folder / "cat/2.png").unlink()
        if given.pop("model", False):
            with torch.no_grad():
                next(model.original_model.parameters()).mul_(2)
        settings = {**SETTINGS, "use_cached_activations": cached, **given}
        settings["cached_activations_path"] = str(training.folder / "activations")
        cfg = training.multi(saes={name: make() for name, make in SAES.items()}, **settings)
        return training.runner(cfg, override_dataset=load_images(folder), override_model=model)

    ended = run_job(2, runner)
    assert [type(each) for each in ended] == [ConfigError] * 2, ended
    for each in ended:
        assert str(each).startswith("ranks: the processes of the job do not have the same work: ")
        assert named in str(each)
    assert not training.output.exists() and not training.checkpoints.exists()


def test_processes_may_have_copies_in_other_places(training, vit_folder, photos, tmp_path):
    """As on machines of which each has the model and the images on its own disk."""

    def runner():
        own = tmp_path / str(Ranks.here().rank)
        settings = {
            "model_name": str(shutil.copytree(vit_folder, own / "vit")),
            "dataset_path": str(shutil.copytree(photos, own / "photos")),
        }
        overrides = {"override_model": None, "override_dataset": None}
        return training.runner(training.multi(**settings), **overrides)

    assert trained(run_job(2, runner)) == [["first"], ["last"]]
