"""A run that was stopped, however, and resumed ends in the same weights to the bit."""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
from contextlib import nullcontext

import pytest
import torch
import wandb
from far_device import DEVICES, repeatable_on
from sae_lens import (
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAEConfig,
    LoggingConfig,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.training._interruption import InterruptedException
from safetensors.torch import load_file
from taxolens.hooks.activations.extract import TokenExtractor
from taxolens.hooks.models.load import load_vision_model
from taxolens.plugin.training import rng
from taxolens.plugin.training.checkpoints import checkpoints_in, is_whole, latest_checkpoint
from taxolens.plugin.training.interrupts import Interrupts, StepGate, TrainingInterrupted
from taxolens.plugin.training.rng import seeded
from taxolens.registry.architectures.mp import MPTrainingSAEConfig
from taxolens.registry.errors import CheckpointError
from taxolens.registry.nulls import CONSTRAINTS

SIZE = {"d_in": 16, "d_sae": 32}

# Between them: a buffer that is trained beside the weights, coefficients and a learning rate that
# warm up and decay, both estimated normalizations, and dead latents that are revived.
SAES = {
    "topk": lambda: TopKTrainingSAEConfig(**SIZE, k=4),
    "standard": lambda: StandardTrainingSAEConfig(
        **SIZE, l1_coefficient=0.1, l1_warm_up_steps=7, normalize_activations="covariance_whitening"
    ),
    "jumprelu": lambda: JumpReLUTrainingSAEConfig(**SIZE, l0_coefficient=0.1, l0_warm_up_steps=7),
    "batchtopk": lambda: BatchTopKTrainingSAEConfig(
        **SIZE, k=4, normalize_activations="expected_average_only_in"
    ),
    "matryoshka_batchtopk": lambda: MatryoshkaBatchTopKTrainingSAEConfig(
        **SIZE, k=4, matryoshka_widths=[8, 32], use_matryoshka_aux_loss=True
    ),
    "mp": lambda: MPTrainingSAEConfig(**SIZE, k=4, atom_dropout=0.1),
}
SCHEDULE = {
    "n_checkpoints": 2,
    "dead_feature_window": 2,
    "feature_sampling_window": 4,
    "lr_scheduler_name": "cosineannealing",
    "lr_warm_up_steps": 3,
    "lr_decay_steps": 3,
}


@pytest.fixture(autouse=True)
def ctrl_c_is_listened_to():
    """A process started in the background inherits an ignored SIGINT, and would never see one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def weights(folder):
    """Everything written for inference, by file."""
    files = sorted(folder.rglob("*.safetensors"))
    assert files
    return {
        f"{file.relative_to(folder)}:{name}": tensor
        for file in files
        for name, tensor in load_file(file).items()
    }


_whole: dict[str, dict[str, torch.Tensor]] = {}


def whole(training, kind="single"):
    """What the run of the default config writes when nothing stops it; trained once."""
    if kind not in _whole:
        output = training.folder / "whole"
        cfg = getattr(training, kind)(checkpoint_id="whole", output_path=str(output))
        training.runner(cfg).run()
        _whole[kind] = weights(output)
    return _whole[kind]


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    differing = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not differing


def assert_every_checkpoint_leads_to(expected, training, make_config, runner=None):
    checkpoints = checkpoints_in(training.checkpoints)
    assert len(checkpoints) == SCHEDULE["n_checkpoints"]
    for checkpoint in checkpoints:
        cfg = make_config(
            resume_from_checkpoint=str(checkpoint), output_path=str(training.folder / "again")
        )
        (runner or training.runner)(cfg).run()
        assert_same(weights(training.folder / "again"), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("architecture", "tokens", "prefetch"),
    [
        ("topk", "class", False),
        ("topk", "patch", 2),
        ("standard", "mean_patch", True),
        ("jumprelu", "all", 3),
        ("batchtopk", "class", 2),
        ("matryoshka_batchtopk", "patch", False),
        ("mp", "class", 2),
    ],
)
def test_one_sae_resumes_from_any_checkpoint(
    training, vit_folder, device, architecture, tokens, prefetch
):
    model = load_vision_model(vit_folder, device=device)

    def config(**changes):
        return training.single(
            sae=SAES[architecture](),
            tokens=tokens,
            prefetch_llm_batches=prefetch,
            device=device,
            act_store_device=device,
            **SCHEDULE,
            **changes,
        )

    def runner(cfg):
        return training.runner(cfg, override_model=model)

    with repeatable_on(device):
        runner(config()).run()
        expected = weights(training.output)
        assert_every_checkpoint_leads_to(expected, training, config, runner)
        runner(config(checkpoint_id="repeated")).run()
    assert_same(weights(training.output), expected)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_a_control_resumes_from_any_checkpoint(training, constraint):
    def config(**changes):
        return training.single(constraint=constraint, **SCHEDULE, **{"lr": 0.2, **changes})

    training.runner(config()).run()
    assert_every_checkpoint_leads_to(weights(training.output), training, config)
    (checkpoint, *_) = checkpoints_in(training.checkpoints)
    rows = checkpoint / "initial_rows.safetensors"
    assert rows.exists() == (constraint == "soft_frozen_decoder")
    with pytest.raises(CheckpointError, match=f"constraint: found '{constraint}', wanted None"):
        training.runner(training.single(resume_from_checkpoint=str(checkpoint), **SCHEDULE))


def test_controls_train_beside_their_sae_from_the_same_weights(training):
    """From one pass over the images, each as in a run of its own."""
    kinds = {"trained": None, "frozen": "frozen_decoder", "soft": "soft_frozen_decoder"}

    def config(**changes):
        return training.multi(
            saes={name: SAES["topk"]() for name in kinds},
            hook_names="blocks.0.hook_resid_post",
            constraint={name: kind for name, kind in kinds.items() if kind},
            **{**SCHEDULE, "lr": 0.2, **changes},
        )

    runner = training.runner(config())
    initial = {name: sae.W_dec.detach().clone() for name, sae in runner.saes.items()}
    runner.run()
    found = weights(training.output)
    rows = {name: sae.W_dec.detach() for name, sae in runner.saes.items()}
    assert torch.equal(initial["trained"], initial["frozen"])
    assert torch.equal(rows["frozen"], initial["frozen"])
    cosine = torch.cosine_similarity(rows["soft"], initial["soft"])
    assert (cosine > 0.8 - 1e-6).all() and not torch.equal(rows["soft"], rows["trained"])
    assert (torch.cosine_similarity(rows["trained"], initial["trained"]) < 0.79).any()
    for name, kind in kinds.items():
        metadata = json.loads((training.output / name / "cfg.json").read_text())["metadata"]
        assert metadata.get("constraint") == kind
    assert_every_checkpoint_leads_to(found, training, config)


def test_a_run_of_a_constant_learning_rate_can_be_made_longer(training):
    """It ends as the run that had so many tokens from the start."""
    longer = {"training_tokens": 160, "dead_feature_window": 1}
    output = training.folder / "longer"
    cfg = training.single(**longer, checkpoint_id="longer", output_path=str(output))
    training.runner(cfg).run()
    training.runner(training.single(n_checkpoints=1, dead_feature_window=1)).run()
    cfg = training.single(**longer, resume_from_checkpoint=str(training.checkpoints))
    training.runner(cfg).run()
    assert_same(weights(training.output), weights(output))


@pytest.mark.parametrize("back", ["to an earlier one", "before a damaged one"])
def test_a_run_that_goes_back_keeps_what_it_writes(training, caplog, back):
    settings = {"n_checkpoints": 4, "keep_checkpoints": 1}
    training.runner(training.single(n_checkpoints=4)).run()  # 24, 40, 56, 72
    if back == "to an earlier one":
        left, step = "40, 56, 72", 3  # the next one is of the signal, after 32 tokens
        settings["dead_feature_window"] = 2
        start = str(training.checkpoints / "24")
    else:
        left, step, start = "72", 7, "auto"
        weights_file = training.checkpoints / "72" / "sae_weights.safetensors"
        weights_file.write_bytes(weights_file.read_bytes()[:-1])
    stopped = training.meddling(
        training.sae(), lambda: os.kill(os.getpid(), signal.SIGTERM), step=step
    )
    cfg = training.single(**settings, resume_from_checkpoint=start, overwrite_output=True)
    with pytest.raises(TrainingInterrupted):
        training.runner(cfg, override_sae=stopped).run()
    written = str(8 * step + 8)
    found = [path.name for path in checkpoints_in(training.checkpoints)]
    assert sorted(found) == sorted([written, *left.split(", ")])
    assert f"not count them: {left}." in caplog.text
    cfg = training.single(**settings, resume_from_checkpoint="auto", overwrite_output=True)
    training.runner(cfg)
    assert cfg.resume_from_checkpoint == str(training.checkpoints / written)


@pytest.mark.parametrize(("tokens", "prefetch"), [("class", False), ("patch", 2)])
def test_many_saes_resume_from_any_checkpoint(training, tokens, prefetch):
    hooks = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]

    names = ["standard", "jumprelu", "batchtopk"]

    def config(**changes):
        return training.multi(
            saes={name: SAES[name]() for name in names},
            hook_names={name: hooks[index % 2] for index, name in enumerate(names)},
            tokens=tokens,
            prefetch_llm_batches=prefetch,
            **SCHEDULE,
            **changes,
        )

    training.runner(config()).run()
    expected = weights(training.output)
    assert {name.split("/")[0] for name in expected} == set(names)
    assert_every_checkpoint_leads_to(expected, training, config)


def test_training_from_cached_activations_resumes_too(training):
    def config(**changes):
        folder = str(training.folder / "activations")
        return training.multi(
            use_cached_activations=True, cached_activations_path=folder, **SCHEDULE, **changes
        )

    training.runner(config()).run()
    assert_every_checkpoint_leads_to(weights(training.output), training, config)
    checkpoint = str(training.checkpoints / "32")
    with pytest.raises(CheckpointError, match=r"activations.from: found 'cache', wanted 'model'"):
        training.runner(training.multi(**SCHEDULE, resume_from_checkpoint=checkpoint))


def test_what_an_architecture_draws_while_it_trains_is_drawn_again(training):
    class NoisySAE(TopKTrainingSAE):
        def training_forward_pass(self, step_input):
            step_input.sae_in = step_input.sae_in + 0.1 * torch.randn_like(step_input.sae_in)
            return super().training_forward_pass(step_input)

    def runner(cfg):
        with seeded(0):
            return training.runner(cfg, override_sae=NoisySAE(SAES["topk"]()))

    def config(**changes):
        return training.single(prefetch_llm_batches=2, **SCHEDULE, **changes)

    runner(config()).run()
    torch.manual_seed(99)
    assert_every_checkpoint_leads_to(weights(training.output), training, config, runner)


@pytest.mark.parametrize("prefetch", [False, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_a_step_stops_after_it_with_a_checkpoint(training, prefetch, number):
    expected = whole(training)
    handler = signal.getsignal(number)

    cfg = training.single(prefetch_llm_batches=prefetch)
    sae = training.meddling(training.sae(), lambda: signal.raise_signal(number), step=4)
    with pytest.raises(TrainingInterrupted) as stopped:
        training.runner(cfg, override_sae=sae).run()
    assert isinstance(stopped.value, InterruptedException)  # what SAELens raises
    checkpoint = training.checkpoints / "40"
    assert str(stopped.value) == (
        f"{number.name}: training stopped after 40 of 80 tokens; "
        f'resume with resume_from_checkpoint="{checkpoint}".'
    )
    assert signal.getsignal(number) is handler
    assert [path.name for path in checkpoints_in(training.checkpoints)] == ["40"]

    training.runner(training.single(resume_from_checkpoint=str(checkpoint))).run()
    assert_same(weights(training.output), expected)


def test_a_run_stopped_between_two_windows_of_sparsity_resumes(training):
    """SAELens has then reset the counts of the window that has ended, before the signal is heard."""
    window = {"feature_sampling_window": 4}
    training.runner(training.single(**window)).run()
    expected = weights(training.output)
    sae = training.meddling(training.sae(), lambda: signal.raise_signal(signal.SIGTERM), step=3)
    with pytest.raises(TrainingInterrupted):
        training.runner(training.single(checkpoint_id="stopped", **window), override_sae=sae).run()
    cfg = training.single(resume_from_checkpoint=str(training.folder / "checkpoints/stopped"))
    cfg.feature_sampling_window = 4
    training.runner(cfg).run()
    assert_same(weights(training.output), expected)


def test_a_run_stopped_again_and_again_resumes_by_itself(training):
    expected = whole(training, "multi")
    for step in (2, 3, 7):
        cfg = training.multi(resume_from_checkpoint="auto")
        saes = {
            "first": training.meddling(training.sae(), lambda: None),
            "last": training.meddling(
                training.sae(), lambda: signal.raise_signal(signal.SIGTERM), step=step
            ),
        }
        with pytest.raises(TrainingInterrupted):
            training.runner(cfg, override_saes=saes).run()
        assert latest_checkpoint(training.checkpoints).name == str(8 * (step + 1))
    training.runner(training.multi(resume_from_checkpoint="auto")).run()
    assert_same(weights(training.output), expected)


@pytest.mark.parametrize("kind", ["single", "multi"])
@pytest.mark.parametrize("when", ["while norms are estimated", "after that"])
def test_a_signal_before_the_first_step_loses_nothing(training, monkeypatch, kind, when):
    def config(**changes):
        saes = {"sae": SAES["batchtopk"]()}
        if kind == "multi":
            saes = {"saes": {"first": SAES["batchtopk"](), "last": SAES["standard"]()}}
        return getattr(training, kind)(**saes, **changes)

    training.runner(config(checkpoint_id="whole")).run()
    expected = weights(training.output)

    served, read = [], StepGate.__next__

    def interrupted(gate):
        served.append(read(gate))
        if len(served) == (1 if when == "while norms are estimated" else 2):
            signal.raise_signal(signal.SIGTERM)
        return served[-1]

    with monkeypatch.context() as patch, pytest.raises(TrainingInterrupted, match="after 0 of 80"):
        patch.setattr(StepGate, "__next__", interrupted)
        training.runner(config(prefetch_llm_batches=2)).run()
    training.runner(config(resume_from_checkpoint=str(training.checkpoints / "0"))).run()
    assert_same(weights(training.output), expected)


@pytest.mark.parametrize("prefetch", [False, 2])
def test_a_signal_in_a_window_of_activations_ends_its_gathering(training, monkeypatch, prefetch):
    settings = {"tokens": "patch", "n_batches_in_buffer": 1000, "n_checkpoints": 0}
    settings |= {"training_tokens": 64, "checkpoint_path": str(training.folder / "checkpoints")}
    training.runner(training.single(checkpoint_id="whole", **settings)).run()
    expected = weights(training.output)

    passes, done = [], []
    extract = TokenExtractor.__call__

    def interrupted(self, batch):
        passes.append(1)
        if len(passes) == 2:  # in the prefetching thread a signal is sent to the main one
            os.kill(os.getpid(), signal.SIGTERM)
            received.wait(30)
        done.append(extract(self, batch))
        return done[-1]

    received = threading.Event()
    note = Interrupts._note

    def noted(self, number, frame):
        try:
            note(self, number, frame)
        finally:
            received.set()

    with monkeypatch.context() as patch, pytest.raises(TrainingInterrupted, match="after 0 of 64"):
        patch.setattr(TokenExtractor, "__call__", interrupted)
        patch.setattr(Interrupts, "_note", noted)
        training.runner(training.single(prefetch_llm_batches=prefetch, **settings)).run()
    assert len(passes) == 2  # of the three in the window
    assert len(done) == (2 if prefetch else 1)  # the other thread's forward pass ends
    training.runner(training.single(resume_from_checkpoint="auto", **settings)).run()
    assert_same(weights(training.output), expected)


def test_a_signal_in_an_evaluation_ends_it_and_then_the_training(training):
    expected = whole(training, "multi")
    ends = []

    def evaluator(sae, data_provider, activation_scaler):
        if len(ends) == 0:
            ends.append("begun")
            try:
                signal.raise_signal(signal.SIGTERM)
                ends.append("went on")
            finally:
                ends.append("left")
        return {"never": 1.0}

    logger = LoggingConfig(log_to_wandb=True, wandb_log_frequency=1, eval_every_n_wandb_logs=3)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TrainingInterrupted) as stopped:
        patch.setenv("WANDB_MODE", "disabled")
        cfg = training.multi(logger=logger, evaluator=evaluator)
        training.runner(cfg).run()
    wandb.finish()
    wandb.teardown()
    assert ends == ["begun", "left"]
    checkpoint = latest_checkpoint(training.checkpoints)
    assert str(checkpoint) in str(stopped.value)
    training.runner(training.multi(resume_from_checkpoint=str(checkpoint))).run()
    assert_same(weights(training.output), expected)


@pytest.mark.parametrize("error", [None, ValueError])
def test_an_evaluation_that_no_signal_ends(error):
    interrupts = Interrupts()

    def evaluate():
        if error:
            raise error
        return {"m": 1.0}

    with interrupts, pytest.raises(error) if error else nullcontext():
        assert interrupts.unless_stopped(evaluate) == {"m": 1.0}
    with interrupts:
        signal.raise_signal(signal.SIGINT)  # only recorded
        assert interrupts.unless_stopped(lambda: pytest.fail("it is not begun")) == {}


def test_a_signal_in_the_last_step_comes_after_the_output(training):
    expected = whole(training)
    received = []
    handler = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        sae = training.meddling(training.sae(), lambda: signal.raise_signal(signal.SIGTERM), step=9)
        training.runner(training.single(), override_sae=sae).run()
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert received == [signal.SIGTERM]
    assert_same(weights(training.output), expected)


def test_a_second_ctrl_c_stops_at_once(training):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    cfg = training.single(n_checkpoints=4)
    sae = training.meddling(training.sae(), twice, step=4)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        training.runner(cfg, override_sae=sae).run()
    assert [path.name for path in checkpoints_in(training.checkpoints)] == ["24"]
    assert is_whole(training.checkpoints / "24")
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            signal.raise_signal(signal.SIGINT)
        assert interrupts.received is None
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_run_can_be_started_outside_the_main_thread(training):
    import threading

    results = []
    cfg = training.single()
    thread = threading.Thread(target=lambda: results.append(training.runner(cfg).run()))
    thread.start()
    thread.join()
    assert len(results) == 1


KILLED = """
    import os, signal, sys
    from taxolens.registry.architectures.parts.sparse_step import SparseTopK
    from taxolens.plugin.training.config import VisionSAERunnerConfig
    from taxolens.plugin.training.rng import seeded
    from taxolens.plugin.training.runner import VisionSAETrainingRunner

    class KilledInItsSecondSave(SparseTopK):
        saves = 0

        def save_model(self, path):
            self.saves += 1
            written = super().save_model(path)
            if self.saves == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return written

    cfg = VisionSAERunnerConfig.load(sys.argv[1])
    with seeded(cfg.seed):
        sae = KilledInItsSecondSave(cfg.sae)
    VisionSAETrainingRunner(cfg, override_sae=sae).run()
"""


def test_a_run_killed_while_it_saves_resumes_from_the_checkpoint_before(training, caplog, forks):
    expected = whole(training)

    cfg = training.single(n_checkpoints=3, prefetch_llm_batches=2)
    path = cfg.save(training.folder / "config.yaml")
    killed = forks.run(KILLED, path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in checkpoints_in(training.checkpoints)] == ["48", "24"]

    cfg = training.single(prefetch_llm_batches=2, resume_from_checkpoint=str(training.checkpoints))
    training.runner(cfg).run()
    assert f"{training.checkpoints / '48'}: incomplete" in caplog.text
    assert cfg.resume_from_checkpoint == str(training.checkpoints / "24")
    assert_same(weights(training.output), expected)


@pytest.fixture
def full_disk():
    """A switch: from then on no file can grow above the number of bytes given."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda n_bytes: resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("n_bytes", [1000, 6000], ids=["the weights", "the optimizer"])
@pytest.mark.parametrize("kind", ["single", "multi"])
def test_a_disk_that_fills_costs_no_earlier_checkpoint(training, full_disk, kind, n_bytes):
    make = getattr(training, kind)
    expected = whole(training, kind)

    cfg = make(n_checkpoints=3)
    meddling = training.meddling(training.sae(), lambda: full_disk(n_bytes), save=2)
    overrides = {"override_sae": meddling}
    if kind == "multi":
        other = training.meddling(training.sae(), lambda: None)
        overrides = {"override_saes": {"first": other, "last": meddling}}
    runner = training.runner(cfg, **overrides)
    with pytest.raises(CheckpointError) as failed:
        runner.run()
    full_disk(resource.RLIM_INFINITY)
    assert f"{training.checkpoints / '48'}: could not be written" in str(failed.value)
    assert f"the last complete one is {training.checkpoints / '24'}." in str(failed.value)
    assert [path.name for path in checkpoints_in(training.checkpoints)] == ["24"]

    training.runner(make(resume_from_checkpoint=str(training.checkpoints))).run()
    assert_same(weights(training.output), expected)


def test_a_disk_full_at_the_end_leaves_no_half_sae_and_a_way_to_finish(training, full_disk):
    expected = whole(training)

    output = training.folder / "full"
    cfg = training.single(n_checkpoints=3, output_path=str(output))
    sae = training.meddling(training.sae(), lambda: full_disk(1000), final_save=1)
    runner = training.runner(cfg, override_sae=sae)
    with pytest.raises(CheckpointError, match="could not be written") as failed:
        runner.run()
    full_disk(resource.RLIM_INFINITY)
    last = training.checkpoints / "64"
    assert f'Make room, then finish it with resume_from_checkpoint="{last}"' in str(failed.value)
    assert not list(output.rglob("*"))

    training.runner(
        training.single(resume_from_checkpoint=str(last), output_path=str(output))
    ).run()
    assert_same(weights(output), expected)


def test_what_cannot_be_written_in_its_place_is_written_elsewhere(training, full_disk, monkeypatch):
    elsewhere = training.folder / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))

    class Meddling(training.meddling):
        def save_inference_model(self, path):
            if self.final_saves:
                full_disk(resource.RLIM_INFINITY)
            return super().save_inference_model(path)

    sae = Meddling(training.sae(), lambda: full_disk(1000), final_save=1)
    runner = training.runner(training.single(), override_sae=sae)
    with pytest.raises(CheckpointError, match=r"The trained SAE is in .*elsewhere.* instead"):
        runner.run()
    (written,) = elsewhere.iterdir()
    assert torch.equal(load_file(written / "sae_weights.safetensors")["b_dec"], sae.b_dec)


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_draws_what_it_draws_after_a_manual_seed(device):
    drawn = []
    for set_seed in (torch.manual_seed, lambda seed: rng._set_seed(seed, torch.device(device))):
        set_seed(7)
        drawn.append([torch.rand(4, device=place).cpu() for place in ("cpu", device)])
    for one, other in zip(*drawn):
        assert one.equal(other)
