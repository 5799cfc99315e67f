"""The benchmark with known truth, on dictionaries whose scores are known."""

import json
import sys

import known_truth
import numpy as np
import pytest
import torch
from architectures import NAMES, Budget, Schedule, options, train
from known_truth import absorption, match, mp_sae_tree, pairs_found, score, small_truth
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig


def dictionary_sae(rows: torch.Tensor) -> JumpReLUSAE:
    """Encodes and decodes with the same rows (m, d); what is below .01 does not fire."""
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=rows.shape[1], d_sae=len(rows)))
    sae.W_dec.data, sae.W_enc.data = rows.clone(), rows.T.clone()
    sae.threshold.data.fill_(0.01)
    return sae.eval()


def test_every_feature_fires_with_exactly_its_probability():
    truth = small_truth(0)
    fires = truth.sample(60_000, seed=1)[0] > 0
    _, given_parent = mp_sae_tree()
    expected = np.where(truth.parents >= 0, 0.2 * given_parent, given_parent)
    rate = fires.float().mean(dim=0).numpy()
    sigma = np.sqrt(expected * (1 - expected) / len(fires))
    assert (abs(rate - expected) < 5 * sigma).all()
    assert (fires[:, truth.parents < 0].sum(dim=1) == 1).all()
    for parent, child in truth.pairs:
        assert not (fires[:, child] & ~fires[:, parent]).any()
    for parent in (0, 4, 8):
        assert fires[:, truth.parents == parent].sum(dim=1).max() == 1


def test_magnitudes_follow_the_regime():
    truth = small_truth(0, child_mean=0.5, child_std=1 / 400, parent_mean=1.0, parent_std=0.25)
    magnitudes, _ = truth.sample(60_000, seed=2)
    child, parent, leaf = (column[column > 0] for column in magnitudes[:, [1, 0, 12]].T)
    assert child.mean() == pytest.approx(0.5, abs=1e-3)
    assert child.std() == pytest.approx(1 / 400, rel=0.1)
    for top in (parent, leaf):
        assert top.mean() == pytest.approx(1.0, abs=0.02)
        assert top.std() == pytest.approx(0.25, rel=0.05)


@pytest.mark.parametrize("correlation", known_truth.CORRELATIONS)
def test_features_correlate_within_their_group_alone(correlation):
    truth = small_truth(3, correlation)
    cosine = truth.directions @ truth.directions.T
    for group in (truth.parents < 0, truth.parents == 0, truth.parents == 8):
        among = cosine[group][:, group]
        among = among[~torch.eye(len(among), dtype=torch.bool)]
        torch.testing.assert_close(among, torch.full_like(among, correlation), atol=2e-3, rtol=0)
    pairs = truth.pairs
    assert cosine[pairs[:, 0], pairs[:, 1]].abs().max() < 1e-5


def test_the_true_dictionary_is_perfect():
    truth = small_truth(0)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    numbers = score(dictionary_sae(truth.directions[order]), truth)
    assert numbers["mcc"] == pytest.approx(1, abs=1e-5)
    assert numbers["absorption"] == pytest.approx(0, abs=1e-5)
    assert numbers["r2"] == pytest.approx(1, abs=1e-5)
    assert (numbers["f1"], numbers["pairs"], numbers["dead"]) == (1, 1, 0)
    assert numbers["l0"] == pytest.approx(1.36, abs=0.02)


def test_a_random_dictionary_is_poor():
    torch.manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(20, 20), dim=1)
    numbers = score(dictionary_sae(rows), small_truth(0))
    assert numbers["mcc"] < 0.6
    assert numbers["f1"] < 0.4
    assert numbers["pairs"] < 0.3


def test_perfect_absorption_is_recognised():
    truth = small_truth(0, child_mean=1.0, child_std=0.0, parent_std=0.0)
    magnitudes, _ = truth.sample(5000, seed=3)
    decoder, z = truth.directions.clone(), magnitudes.clone()
    for parent, child in truth.pairs:
        decoder[child] = 1.5 * decoder[parent] + decoder[child]
        z[magnitudes[:, child] > 0, parent] = 0  # the child speaks for its parent
    matched = match(z, magnitudes)
    assert (matched == np.arange(20)).all()
    expected = 1.5 / np.hypot(1.5, 1.0)
    assert absorption(matched, decoder, truth.directions, truth.pairs) == pytest.approx(expected)
    assert pairs_found(z, matched, truth.pairs) == 0
    assert pairs_found(magnitudes, matched, truth.pairs) == 1


def test_features_without_a_latent_count_as_not_found():
    truth = small_truth(0)
    magnitudes, _ = truth.sample(2000, seed=4)
    without = magnitudes.clone()[:, :12]  # the eight leaves have none
    matched = match(without, magnitudes)
    assert (matched[:12] == np.arange(12)).all()
    assert (matched[12:] == -1).all()
    assert pairs_found(without, matched, np.array([[0, 1], [0, 12]])) == 0.5


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_has_settings_and_trains(name):
    budget = Budget(20, 20, 1.36, 2.5, (11, 9), residual_threshold=0.05)
    truth = small_truth(0)
    sae, _ = train(name, budget, Schedule(12, 64, 3e-3), truth.batches(64, 0), seed=0)
    assert all(np.isfinite(value) for value in score(sae, truth, n=1000).values())


def test_settings_are_for_registered_architectures_only():
    assert set(options(Budget(8, 16, 2, 8, (4, 12)))) == set(NAMES)


def test_data_do_not_depend_on_the_architecture():
    first, second = small_truth(0).batches(10, seed=0), small_truth(0).batches(10, seed=0)
    torch.manual_seed(1)
    a = [next(first) for _ in range(60)]
    torch.manual_seed(2)
    b = [next(second) for _ in range(60)]
    assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert not torch.equal(a[0], next(small_truth(0).batches(10, seed=1)))


def test_a_stopped_run_is_resumed(monkeypatch, tmp_path, capsys):
    file = tmp_path / "results.jsonl"
    command = ["known_truth.py", "absorption", "--steps", "15", "--seeds", "1"]
    command += ["--architectures", "topk", "random", "--results", str(file)]
    monkeypatch.setattr(sys, "argv", command)
    known_truth.main()
    lines = file.read_text().splitlines()
    assert [json.loads(line)["child_mean"] for line in lines] == [0.1, 0.1, 0.5, 0.5, 1.0, 1.0]
    assert "| `topk` | 1 |" in capsys.readouterr().out

    file.write_text("\n".join(lines[:-2]) + "\n")
    known_truth.main()
    assert [json.loads(line)["absorption"] for line in file.read_text().splitlines()] == [
        json.loads(line)["absorption"] for line in lines
    ]


@pytest.fixture
def results_of(monkeypatch, tmp_path):
    """Runs the smallest experiment with some more arguments; all results there are by then."""

    def run(*arguments: str) -> list[dict]:
        file = tmp_path / "results.jsonl"
        command = ["known_truth.py", "hierarchy", "--architectures", "topk", "--correlations", "0"]
        command += ["--stds", "0.25", "--steps", "5", "--seeds", "1", "--results", str(file)]
        monkeypatch.setattr(sys, "argv", command + list(arguments))
        known_truth.main()
        return [json.loads(line) for line in file.read_text().splitlines()]

    return run


def test_settings_of_ones_own_are_a_case_of_their_own(results_of, capsys):
    for own in ([], ["--options", '{"k": 1}'], ["--lr", "0.1"]):
        results_of(*own)
    rows = results_of("--options", '{ "k":1 }')  # the same, spelt otherwise
    assert [(row["options"], row["lr"], round(row["l0"])) for row in rows] == [
        ("{}", 0.03, 2), ('{"k": 1}', 0.03, 1), ("{}", 0.1, 2)]  # fmt: skip
    assert 'options {"k": 1}' in capsys.readouterr().out


def test_results_of_before_a_field_was_added_are_kept(results_of, tmp_path, capsys):
    (row,) = results_of()
    for later in ("lr", "options", "parent_mean"):
        del row[later]
    (tmp_path / "results.jsonl").write_text(json.dumps(row) + "\n")
    assert results_of() == [row]
    assert "| `topk` | 1 |" in capsys.readouterr().out


def test_a_large_result_of_before_had_its_own_rate():
    row = {"experiment": "large", "architecture": "topk", "seed": 0, "steps": 600}
    assert known_truth.Case.of(row).lr == 3e-3


def test_training_that_diverged_has_no_scores():
    truth = small_truth(0)
    rows = truth.directions.clone()
    rows[3] = float("nan")
    assert all(np.isnan(value) for value in score(dictionary_sae(rows), truth, n=100).values())
