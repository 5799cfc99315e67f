import json

import pytest
import torch
from taxolens.plugin.training.checkpoints import (
    MANIFEST_FILENAME,
    RunIdentity,
    check_same_run,
    checkpoints_beyond,
    checkpoints_in,
    find_checkpoint,
    is_whole,
    latest_checkpoint,
    prune_checkpoints,
    read_manifest,
    resolve_checkpoint,
    write_manifest,
    written_whole,
)
from taxolens.plugin.training.rng import seeded
from taxolens.registry.errors import CheckpointError

RUN = RunIdentity(
    fixed={"saes": {"sae": {"architecture": "topk", "d_sae": 32}}, "tokens": "class"},
    training={"lr": 0.01},
)


def checkpoint(folder, samples, run=RUN):
    path = folder / str(samples)
    (path / "first").mkdir(parents=True)
    (path / "trainer_state.pt").write_bytes(b"state" * 100)
    (path / "first" / "sae_weights.safetensors").write_bytes(b"weights" * 100)
    write_manifest(path, run, n_training_samples=samples, n_training_steps=samples // 8)
    return path


def test_a_manifest_lists_every_file_of_the_checkpoint(tmp_path):
    path = checkpoint(tmp_path, 16)
    manifest = read_manifest(path)
    assert set(manifest.files) == {"trainer_state.pt", "first/sae_weights.safetensors"}
    assert (manifest.n_training_samples, manifest.n_training_steps) == (16, 2)
    assert manifest.run == RUN
    assert is_whole(path)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def change_one_byte(path):
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("first/sae_weights.safetensors", truncate, "699 bytes in place of 700"),
        ("first/sae_weights.safetensors", change_one_byte, "is not as it was written"),
        ("trainer_state.pt", lambda path: path.unlink(), "is missing"),
        (MANIFEST_FILENAME, lambda path: path.unlink(), "has no checkpoint.json"),
        (MANIFEST_FILENAME, truncate, "checkpoint.json"),
    ],
)
def test_a_torn_checkpoint_is_named_and_the_one_before_it_used(
    tmp_path, caplog, file, damage, said
):
    older, newer = checkpoint(tmp_path, 8), checkpoint(tmp_path, 16)
    damage(newer / file)
    assert not is_whole(newer)
    assert latest_checkpoint(tmp_path) == older
    assert str(newer) in caplog.text and said in caplog.text
    assert resolve_checkpoint(newer) == older
    assert resolve_checkpoint(tmp_path) == older


def test_the_newest_is_that_of_most_samples(tmp_path):
    for samples in (8, 96, 104):
        checkpoint(tmp_path, samples)
    (tmp_path / "final_200").mkdir()
    (tmp_path / "notes.txt").touch()
    assert [path.name for path in checkpoints_in(tmp_path)] == ["104", "96", "8"]
    assert latest_checkpoint(tmp_path, before=104) == tmp_path / "96"
    assert latest_checkpoint(tmp_path / "nothing") is None


def test_a_torn_checkpoint_does_not_stand_for_a_later_one(tmp_path):
    torn = checkpoint(tmp_path, 8)
    checkpoint(tmp_path, 16)
    (torn / MANIFEST_FILENAME).unlink()
    with pytest.raises(CheckpointError, match="No complete checkpoint comes before it"):
        resolve_checkpoint(torn)


def test_a_folder_without_a_whole_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        resolve_checkpoint(tmp_path / "typo")
    with pytest.raises(CheckpointError, match="has no complete checkpoint"):
        resolve_checkpoint(tmp_path)


def test_what_is_written_at_the_end_of_training_cannot_be_resumed(tmp_path):
    (tmp_path / "final_80").mkdir()
    with pytest.raises(CheckpointError, match=r"nothing to resume.*from_pretrained_path"):
        resolve_checkpoint(tmp_path / "final_80")


def test_a_checkpoint_that_was_renamed_is_still_one(tmp_path):
    checkpoint(tmp_path, 8).rename(tmp_path / "best")
    assert resolve_checkpoint(tmp_path / "best") == tmp_path / "best"


def test_a_random_id_of_digits_alone_is_no_checkpoint(tmp_path):
    path = checkpoint(tmp_path / "12345678", 8)
    assert checkpoints_in(tmp_path) == []
    assert resolve_checkpoint(tmp_path / "12345678") == path
    assert find_checkpoint(tmp_path, RUN) == path


def test_auto_finds_the_furthest_checkpoint_of_this_very_run(tmp_path):
    other = RunIdentity({**RUN.fixed, "tokens": "patch"}, RUN.training)
    checkpoint(tmp_path / "a", 8)
    found = checkpoint(tmp_path / "b", 16)
    checkpoint(tmp_path / "c", 24, other)
    torn = checkpoint(tmp_path / "b", 32)
    truncate(torn / "trainer_state.pt")
    assert find_checkpoint(tmp_path, RUN) == found
    assert find_checkpoint(tmp_path / "nothing", RUN) is None


def test_a_checkpoint_of_another_run_is_refused_field_by_field(tmp_path):
    path = checkpoint(tmp_path, 8)
    saes = {"sae": {"architecture": "jumprelu", "d_sae": 32}}
    with pytest.raises(CheckpointError) as refused:
        check_same_run(path, RunIdentity({"saes": saes, "tokens": "patch"}, RUN.training))
    assert "saes.sae.architecture: found 'topk', wanted 'jumprelu'" in str(refused.value)
    assert "tokens: found 'class', wanted 'patch'" in str(refused.value)
    assert "d_sae" not in str(refused.value)


def with_training(**changes):
    training = {"lr_scheduler_name": "constant", "lr_decay_steps": 0, "training_tokens": 80}
    return RunIdentity(RUN.fixed, {**RUN.training, **training, **changes})


@pytest.mark.parametrize(
    "schedule", [{"lr_scheduler_name": "cosineannealing"}, {"lr_decay_steps": 3}]
)
def test_a_schedule_that_ends_with_the_run_fixes_its_length(tmp_path, caplog, schedule):
    path = checkpoint(tmp_path, 8, with_training())
    check_same_run(path, with_training(training_tokens=160))
    assert "training_tokens: found 80, wanted 160. They take effect" in caplog.text
    path = checkpoint(tmp_path, 16, with_training(**schedule))
    with pytest.raises(CheckpointError, match="other settings: training_tokens: found 80, wanted"):
        check_same_run(path, with_training(**schedule, training_tokens=160))


def test_settings_that_an_older_checkpoint_lacks_are_not_compared(tmp_path):
    check_same_run(checkpoint(tmp_path, 8), with_training(from_pretrained_path="/start"))


def test_the_search_leaves_out_checkpoints_whose_state_overrules_settings(tmp_path):
    path = checkpoint(tmp_path / "a", 8)
    assert find_checkpoint(tmp_path, RUN) == path
    assert find_checkpoint(tmp_path, RunIdentity(RUN.fixed, {"lr": 0.02})) is None


def test_the_search_prefers_checkpoints_of_exactly_these_settings(tmp_path):
    """A run that went back to 16 to change a setting has left 24 behind."""
    changed = with_training(autocast=True)
    checkpoint(tmp_path / "a", 16, with_training())
    checkpoint(tmp_path / "a", 24, with_training())
    assert find_checkpoint(tmp_path, changed) == tmp_path / "a" / "24"  # the only ones
    mine = checkpoint(tmp_path / "a", 20, changed)
    assert find_checkpoint(tmp_path, changed) == mine
    assert find_checkpoint(tmp_path, with_training()) == tmp_path / "a" / "24"
    checkpoint(tmp_path / "b", 64, with_training())
    assert find_checkpoint(tmp_path, changed) == mine
    truncate(mine / "trainer_state.pt")
    assert find_checkpoint(tmp_path, changed) == tmp_path / "b" / "64"


def test_pruning_does_not_count_what_a_run_has_left_behind(tmp_path):
    for samples in (8, 16, 24, 32):
        checkpoint(tmp_path, samples)
    (tmp_path / "40").mkdir()
    assert [path.name for path in checkpoints_beyond(tmp_path, 16)] == ["32", "24"]
    prune_checkpoints(tmp_path, keep=1, apart={"24", "32"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["16", "24", "32", "40"]


def test_pruning_keeps_the_newest(tmp_path):
    for samples in (8, 16, 24):
        checkpoint(tmp_path, samples)
    (tmp_path / "final_24").mkdir()
    prune_checkpoints(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["16", "24", "final_24"]


def sae_files(folder, text):
    (folder / "sae").mkdir()
    for name in ("cfg.json", "sae_weights.safetensors"):
        (folder / "sae" / name).write_text(text)


def test_outputs_replace_older_ones_and_leave_other_files_alone(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    for text in ("old", "new"):
        with written_whole(tmp_path) as partial:
            sae_files(partial, text)
    assert (tmp_path / "sae" / "cfg.json").read_text() == "new"
    assert (tmp_path / "sae" / "sae_weights.safetensors").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "sae"]


def test_outputs_that_fail_leave_the_older_ones(tmp_path):
    with written_whole(tmp_path) as partial:
        sae_files(partial, "old")
    with pytest.raises(OSError, match="no space"), written_whole(tmp_path) as partial:
        sae_files(partial, "new")
        raise OSError("no space")
    assert (tmp_path / "sae" / "cfg.json").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sae"]


def test_an_sae_moved_halfway_cannot_be_loaded(tmp_path, monkeypatch):
    """New weights never lie beside an old config: cfg.json goes first and comes last."""
    with written_whole(tmp_path) as partial:
        sae_files(partial, "old")

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("taxolens.plugin.training.checkpoints.os.replace", killed)
    with pytest.raises(KeyboardInterrupt), written_whole(tmp_path) as partial:
        sae_files(partial, "new")
    assert not (tmp_path / "sae" / "cfg.json").exists()


def test_seeding_leaves_the_callers_random_state_alone():
    before = torch.get_rng_state()
    with seeded(3):
        first = torch.rand(5)
    assert torch.equal(torch.get_rng_state(), before)
    with seeded(3):
        assert torch.equal(torch.rand(5), first)


def test_a_manifest_is_plain_json(tmp_path):
    content = json.loads((checkpoint(tmp_path, 8) / MANIFEST_FILENAME).read_text())
    assert content["schema"] == "taxolens.checkpoint/2"
    assert set(content["files"]["trainer_state.pt"]) == {"bytes", "sha256"}
