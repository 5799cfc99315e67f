"""The predicted cost of a run: hand-computed sizes and times, counted FLOPs, and a calibration."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sae_lens import BatchTopKTrainingSAEConfig, TopKTrainingSAEConfig
from taxolens.hooks.images.dataset import load_images
from taxolens.plugin.training import calibration
from taxolens.plugin.training.calibration import (
    Costs,
    Size,
    images_forwarded,
    predict,
    size_of,
    time_disk,
)
from taxolens.registry.errors import ConfigError, DataError

COSTS = Costs(
    decode=0.01,
    forward=0.02,
    steps={"a": 3.0, "b": 2.0, "c": 1.0},
    write=1000.0,
    read=4000.0,
    forward_flops=7.0,
    sae_flops={"a": 5.0, "b": 5.0, "c": 5.0},
)
SIZE = Size(images=1000, steps=10, batch=8, written=5000, read=2000)
ALONE = {"n_ranks": 1, "cores": 4, "num_workers": 2}


def test_stages_of_one_process_on_a_cpu() -> None:
    plan = predict(COSTS, SIZE, on_cpu=True, **ALONE)
    # 1000 x .01 s over 2 workers; 1000 x .02 s; 10 steps of 3 + 2 + 1 s; 5000/1000 + 2000/4000 s.
    stages = {"decode": 5.0, "forward": 20.0, "sae": 60.0, "disk": 5.5}
    assert plan["seconds"] == pytest.approx({**stages, "training": 90.5})
    assert plan["bottleneck"] == "sae"
    assert plan["flops"] == {"forward": 7000.0, "sae": 10 * 8 * 15.0}
    assert plan["rates"]["sae"] == pytest.approx(8 / 6)


def test_decoding_overlaps_the_forward_of_a_gpu_where_there_are_workers() -> None:
    assert predict(COSTS, SIZE, on_cpu=False, **ALONE)["seconds"]["training"] == pytest.approx(85.5)
    plan = predict(COSTS, SIZE, on_cpu=False, n_ranks=1, cores=4, num_workers=0)
    assert plan["seconds"]["training"] == pytest.approx(10 + 20 + 60 + 5.5)


def test_ranks_share_images_and_saes_but_one_disk() -> None:
    plan = predict(COSTS, SIZE, on_cpu=True, n_ranks=2, cores=4, num_workers=2)
    # 500 images each; the SAE of 3 s on one rank, those of 2 and 1 s on the other.
    stages = {"decode": 2.5, "forward": 10.0, "sae": 30.0, "disk": 5.5}
    assert plan["seconds"] == pytest.approx({**stages, "training": 48.0})
    assert plan["flops"]["forward"] == 7000.0  # of all ranks
    many = predict(COSTS, SIZE, on_cpu=True, n_ranks=100, cores=4, num_workers=2)
    assert many["seconds"]["sae"] == pytest.approx(30.0)  # the dearest SAE is on one rank


def test_the_slowest_stage_is_the_bottleneck() -> None:
    for stage, changed in (("decode", {"decode": 1.0}), ("forward", {"forward": 1.0}), ("disk", {"write": 1.0})):  # fmt: skip
        plan = predict(Costs(**{**vars(COSTS), **changed}), SIZE, on_cpu=True, **ALONE)
        assert plan["bottleneck"] == stage


class Pictures(list[None]):
    is_streaming = False


def test_a_cache_is_written_once_and_read_for_every_token() -> None:
    cfg = SimpleNamespace(
        training_tokens=300,
        train_batch_size_tokens=30,
        total_training_steps=10,
        store_batch_size_prompts=5,
        n_batches_in_buffer=1,
    )
    images = Pictures([None] * 50)
    n_bytes = {"output_path": 7, "checkpoint_path": 0, "cached_activations_path": 0}
    # 4 tokens an image: 75 passes; nothing is cached.
    assert size_of(cfg, images, 4, n_bytes) == Size(75, 10, 30, 7, 0)
    # 50 images cached in 800 bytes, 4 bytes a token; 300 tokens are read.
    n_bytes["cached_activations_path"] = 800
    assert size_of(cfg, images, 4, n_bytes) == Size(50, 10, 30, 807, 1200)


@pytest.mark.parametrize("tokens", ["patch", "class"])
@pytest.mark.parametrize("n_tokens", [8, 40, 48, 80, 88])
def test_a_run_ends_after_the_window_that_it_is_in(training, vit, tokens, n_tokens) -> None:
    """Passes of a real run: ten images of four patches, in windows of two passes of four images."""
    cfg = training.single(tokens=tokens, training_tokens=n_tokens)
    runner = training.runner(cfg)
    seen: list[int] = []
    model = vit.original_model
    handle = model.embeddings.register_forward_hook(lambda *of: seen.append(len(of[-1])))
    try:
        runner.run()
    finally:
        handle.remove()
    per_image = 4 if tokens == "patch" else 1
    assert sum(seen) == images_forwarded(cfg, runner.images, per_image)


def test_the_disk_is_timed_beside_a_path_that_is_not_there(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(calibration, "FILE_BYTES", 1 << 21)
    write, read = time_disk(tmp_path / "none" / "cache")
    assert write > 0 and read > 0
    assert not list(tmp_path.iterdir())


def test_a_run_is_calibrated_and_not_changed(training, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(calibration, "BUDGET", 0.01)
    monkeypatch.setattr(calibration, "FILE_BYTES", 1 << 20)
    cfg = training.single(
        sae=TopKTrainingSAEConfig(d_in=16, d_sae=32, k=4), hook_name="blocks.1.hook_resid_post"
    )
    runner = training.runner(cfg)
    before = {k: v.clone() for k, v in runner.sae.state_dict().items()}
    state = torch.get_rng_state()
    costs = calibration.calibrate(cfg, runner.model, runner.images)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in runner.sae.state_dict().items())
    # 5 tokens of width 16 in 2 blocks: patches, then q, k, v and output, both products of the
    # attention, both layers of the MLP of twice the width; 2 FLOPs a multiplication.
    block = 2 * (4 * 5 * 16 * 16 + 2 * 5 * 5 * 16 + 2 * 5 * 16 * 32)
    assert costs.forward_flops == 2 * 4 * (3 * 8 * 8) * 16 + 2 * block
    # Encoding and decoding, and for each two products backwards: b_dec is subtracted from the input.
    assert costs.sae_flops == {"sae": 12 * 16 * 32}
    assert min(costs.decode, costs.forward, costs.steps["sae"], costs.write, costs.read) > 0


def test_saes_of_one_kind_are_timed_once(training, monkeypatch) -> None:
    timed = []

    def time_steps(cfg, sae_cfg, sharing):
        timed.append(sae_cfg.d_sae)
        return 1.0, 2.0, 3

    monkeypatch.setattr(calibration, "_time_steps", time_steps)
    monkeypatch.setattr(calibration, "_time_images", lambda *_: (1.0, 1.0, 1.0))
    monkeypatch.setattr(calibration, "time_disk", lambda _: (1.0, 1.0))
    sizes = {"a": 32, "b": 64, "c": 32}
    saes = {name: TopKTrainingSAEConfig(d_in=16, d_sae=size, k=4) for name, size in sizes.items()}
    cfg = training.multi(saes=saes, hook_names=dict.fromkeys(saes, "blocks.0.hook_resid_post"))
    costs = calibration.calibrate(cfg, None, None, 2)
    assert costs.steps == {"a": 1.0, "b": 1.0, "c": 1.0}
    assert costs.exchanged == 0  # SAEs are dealt
    assert timed == [32, 64]


@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_processes_share_the_batch_of_one_sae(training, monkeypatch, architecture) -> None:
    monkeypatch.setattr(calibration, "BUDGET", 0.01)
    seen = set()

    class Watched(calibration.SAETrainer):
        def step(self, batch):
            seen.add((len(batch), getattr(self.sae, "sparse_step", None)))
            return super().step(batch)

    monkeypatch.setattr(calibration, "SAETrainer", Watched)
    monkeypatch.setattr(calibration, "_time_images", lambda *_: (1.0, 1.0, 1.0))
    monkeypatch.setattr(calibration, "time_disk", lambda _: (1.0, 1.0))
    configs = {"topk": TopKTrainingSAEConfig, "batchtopk": BatchTopKTrainingSAEConfig}
    sae = configs[architecture](d_in=16, d_sae=32, k=4)
    cfg = training.single(sae=sae, train_batch_size_tokens=24)
    few = (calibration.FEW_TOKENS, None)
    assert calibration.calibrate(cfg, None, None).exchanged == 0
    assert seen == {few, (24, True)}
    seen.clear()
    costs = calibration.calibrate(cfg, None, None, 3)
    # The run divides the batch of a sparse step too, unless it selects over the whole batch.
    assert seen == {few, (8, True if architecture == "topk" else None)}
    parameters = 2 * 16 * 32 + 16 + 32
    assert costs.exchanged == 4 * parameters
    plan = predict(costs, SIZE, on_cpu=True, n_ranks=3, cores=4, num_workers=2)
    assert plan["bytes_exchanged"] == SIZE.steps * costs.exchanged
    with pytest.raises(ConfigError, match="5 processes cannot have equal shares of it; given 24"):
        calibration.calibrate(cfg, None, None, 5)


def test_images_of_which_none_can_be_read_are_refused(training, tmp_path: Path) -> None:
    cfg = training.single()
    runner = training.runner(cfg)
    (tmp_path / "bad" / "cat").mkdir(parents=True)
    for index in range(3):
        (tmp_path / "bad" / "cat" / f"{index}.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="not one image can be read"):
        calibration.calibrate(cfg, runner.model, load_images(tmp_path / "bad"))
