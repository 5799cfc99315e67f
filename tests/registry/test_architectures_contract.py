"""What every architecture must do, ours and SAELens's trainable ones alike."""

import copy
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from far_device import CUDA, DEVICES, FAR_DEVICES, on, repeatable_on
from sae_lens import SAE, LoggingConfig, StandardSAE, StandardSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.llm_sae_training_runner import _run_cli
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import SAEConfig, TrainingSAE, TrainingSAEConfig, TrainStepInput
from sae_lens.training.activation_scaler import ActivationScaler, ActivationWhitening
from sae_lens.training.sae_trainer import SAETrainer
from taxolens.hooks.models.forward import run_to_hooks
from taxolens.plugin.manager import load_plugins
from taxolens.plugin.training.constraint import Constraint, within_cosine
from taxolens.registry.architectures.parts.sparse_step import with_sparse_step
from taxolens.registry.errors import ConfigError
from taxolens.registry.evaluators.parts.null_latents import TwinLatents
from taxolens.registry.evaluators.parts.sae_latents import NORMALISING, SAELatents
from taxolens.registry.evaluators.supervised_dictionary import spread
from taxolens.registry.nulls import CONSTRAINTS
from taxolens.registry.table import ARCHITECTURES
from tiny_models import pictures, tapped
from tiny_text import save_tiny_text

load_plugins()

D_IN, D_SAE, BATCH = 12, 24, 64


@dataclass(frozen=True)
class Case:
    """A small configuration of one architecture, and in what it differs from the rule."""

    settings: dict[str, Any] = field(default_factory=dict)
    saved_as: str | None = None  # the built-in architecture it is saved as; None: its own
    same_at_inference: bool = True  # False where training selects over the batch
    whitening: bool = True
    fold_W_dec_norm: bool = True
    trains_in_bfloat16: bool = True
    revives_dead_latents: bool = False
    silent_hooks: frozenset[str] = frozenset()
    needs_samples_for_loss: int = 60  # training steps until the loss must have fallen
    lr: float = 3e-3


PURSUIT = {"whitening": False, "fold_W_dec_norm": False}
REVIVED = {"revives_dead_latents": True}

CASES: dict[str, Case] = {
    "mp": Case(
        {"k": 4, "atom_dropout": 0.1, "residual_threshold": 0.01}, "matching_pursuit", **PURSUIT
    ),
    "omp": Case({"k": 3, "residual_threshold": 0.01}, **PURSUIT),
    "top_afa": Case({"afa_warm_up_steps": 3}, whitening=False, **REVIVED),
    "archetypal_topk": Case({"k": 4, "candidate_steps": 3, "n_candidates": 16}, "topk", **REVIVED),
    "archetypal_jumprelu": Case({"l0_coefficient": 0.01, "candidate_steps": 3}, "jumprelu"),
    "nested_topk": Case({"k": 4, "ks": [1, 2, 4]}, "topk", **REVIVED),
    "random_matryoshka": Case(
        {"k": 4.0, "n_prefixes": 3, "topk_threshold_lr": 0.5},
        "jumprelu",
        same_at_inference=False,
        **REVIVED,
    ),
    "tree": Case({"k": 6, "level_widths": [4, 8, 12], "reallocate_every": 3}, **REVIVED),
    "hsae": Case({"k": 3, "level_widths": [4, 8, 12], "reassign_every": 3}, **REVIVED),
    "codebook": Case({"k": 2, "kmeans_init": 0}, **PURSUIT, lr=3e-2),
    "qlae": Case(),
    "simplicial": Case({"group_size": 6}, fold_W_dec_norm=False, lr=1e-2),
    # SAELens's own
    "standard": Case({"l1_coefficient": 0.01, "l1_warm_up_steps": 3}, "standard"),
    "gated": Case({"l1_coefficient": 0.01}, "gated", trains_in_bfloat16=False),
    "topk": Case({"k": 4}, "topk", **REVIVED),
    "abstopk": Case({"k": 4}, "abstopk"),
    "jumprelu": Case({"l0_coefficient": 0.01, "l0_warm_up_steps": 3}, "jumprelu"),
    "batchtopk": Case({"k": 4.0, "topk_threshold_lr": 0.5}, "jumprelu", same_at_inference=False),
    "matryoshka_batchtopk": Case(
        {"k": 4.0, "matryoshka_widths": [6, 24], "topk_threshold_lr": 0.5},
        "jumprelu",
        same_at_inference=False,
    ),
    "matching_pursuit": Case(
        {"max_iterations": 4, "decoder_init_norm": 1.0},
        "matching_pursuit",
        silent_hooks=frozenset({"hook_sae_acts_pre", "hook_sae_acts_post"}),
        **PURSUIT,
    ),
}
WITHOUT_TIES = {"archetypal_topk": {"n_candidates": D_SAE}}
"""With fewer candidates several latents start equal, and devices choose others of them."""
SPARSE: dict[str, dict[str, Any]] = {
    **{
        name: {"k": 3}
        for name in ("topk", "batchtopk", "matryoshka_batchtopk", "random_matryoshka")
    },
    "nested_topk": {"k": 3, "ks": [1, 3]},
}
"""Few enough latents an input for the sparse step."""
OURS = [name for name in CASES if name in ARCHITECTURES]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
every = pytest.mark.parametrize("name", CASES, ids=str)
ours_only = pytest.mark.parametrize("name", OURS, ids=str)


def config(name: str, **overrides: Any) -> TrainingSAEConfig:
    config_class = get_sae_training_class(name)[1]
    sizes = {"d_in": D_IN, "d_sae": D_SAE}
    return config_class(**{**sizes, **CASES[name].settings, **overrides})


def build(name: str, seed: int = 0, **overrides: Any) -> TrainingSAE[Any]:
    torch.manual_seed(seed)
    return get_sae_training_class(name)[0](config(name, **overrides))


def planted(n: int, seed: int = 0) -> torch.Tensor:
    """Sparse non-negative combinations of a fixed dictionary, off the origin, (n, D_IN)."""
    generator = torch.Generator().manual_seed(99)
    atoms = torch.nn.functional.normalize(torch.randn(D_SAE, D_IN, generator=generator), dim=1)
    generator.manual_seed(seed)
    fires = torch.rand(n, D_SAE, generator=generator) < 3 / D_SAE
    return (fires * (1 + torch.rand(n, D_SAE, generator=generator))) @ atoms + 0.1


def trainer_for(sae, batches, checkpoint_path=None, lr=3e-3, n_checkpoints=0, **overrides):
    cfg = SAETrainerConfig(
        total_training_samples=len(batches) * BATCH,
        train_batch_size_samples=BATCH,
        lr=lr,
        lr_end=lr / 10,
        lr_warm_up_steps=2,
        dead_feature_window=3,
        feature_sampling_window=1000,
        n_checkpoints=n_checkpoints,
        checkpoint_path=checkpoint_path,
        n_batches_for_norm_estimate=2,
        logger=LoggingConfig(log_to_wandb=False),
        **overrides,
    )
    return SAETrainer(cfg, sae, iter(batches))


def step_input(x: torch.Tensor, sae: TrainingSAE[Any], dead: torch.Tensor | None = None):
    coefficients = {
        key: float(getattr(value, "value", value)) for key, value in sae.get_coefficients().items()
    }
    return TrainStepInput(x, coefficients, dead, n_training_steps=0, is_logging_step=True)


def trained(name: str, steps: int = 5, **overrides: Any) -> TrainingSAE[Any]:
    sae = build(name, **overrides)
    trainer = trainer_for(sae, [planted(BATCH, seed) for seed in range(steps)])
    for _ in range(steps):
        trainer.step(next(trainer.data_provider))
    return sae.eval()


@every
@pytest.mark.parametrize("far", FAR_DEVICES)
def test_on_a_device_beside_the_cpu_it_trains_to_the_same_weights(name, far):
    """A tensor on the wrong device is an error on CUDA, as on the simulated device."""

    def weights(device: str) -> dict[str, torch.Tensor]:
        settings = {**SPARSE, **WITHOUT_TIES}.get(name, {})
        sae = with_sparse_step(build(name, device=device, **settings))
        batches = [planted(BATCH, seed).to(device) for seed in range(7)]
        trainer = trainer_for(sae, batches, device=device)
        for x in batches:
            trainer.step(x)
            trainer.n_training_steps += 1
        z = sae.eval().encode(batches[0])
        found = {**sae.state_dict(), "z": z, "out": sae.decode(z)}
        assert {v.device.type for v in found.values()} == {device}
        return {key: value.detach().cpu() for key, value in found.items()}

    near = weights("cpu")
    with on(far):
        found = weights(far)
    assert near.keys() == found.keys()
    for key, value in near.items():
        atol = (
            2e-3 if name == "top_afa" else 1e-4
        )  # two numbers of latents may match almost equally
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=atol, msg=key)


@every
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shapes_and_dtypes(name, dtype):
    sae = build(name, dtype=dtype)
    x = planted(6)
    with torch.no_grad():
        for shape in ((6, D_IN), (2, 3, D_IN)):
            out = sae(x.reshape(shape))
            assert out.shape == shape
            assert out.dtype == sae.dtype
            assert torch.isfinite(out).all()
            acts = sae.encode(x.reshape(shape))
            assert acts.shape == (*shape[:-1], D_SAE)
            assert acts.dtype == sae.dtype
    if dtype == "bfloat16" and not CASES[name].trains_in_bfloat16:
        return
    step = sae.training_forward_pass(step_input(planted(BATCH), sae))
    assert step.feature_acts.shape == (BATCH, D_SAE)
    assert step.loss.shape == ()
    step.loss.backward()
    for parameter_name, parameter in sae.named_parameters():
        assert parameter.dtype in (sae.dtype, torch.float32)
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), parameter_name


@every
def test_gradients_are_finite_and_reach_the_dictionary(name):
    sae = build(name)
    dead = torch.arange(D_SAE) % 2 == 0
    sae.training_forward_pass(step_input(planted(BATCH), sae)).loss.backward()
    sae.training_forward_pass(step_input(planted(BATCH), sae, dead)).loss.backward()
    gradients = {n: p.grad for n, p in sae.named_parameters() if p.grad is not None}
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert any(gradient.abs().sum() > 0 for gradient in gradients.values())


# So that two inputs leave some latents silent, some of them with a positive pre-activation.
SPARSER = {"hsae": {"k": 1}, "top_afa": {"decoder_init_norm": 2.0}}


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.revives_dead_latents])
def test_latents_that_never_fire_have_a_gradient_once_they_count_as_dead(name):
    def encoder_gradient(dead: torch.Tensor | None) -> torch.Tensor:
        sae = trained(name, **SPARSER.get(name, {}))
        with torch.no_grad():
            silent = ~(sae.encode(few) != 0).any(0)
        sae.training_forward_pass(
            step_input(few, sae, silent if dead is None else dead)
        ).loss.backward()
        return sae.W_enc.grad[:, silent].abs().sum(0)

    few = planted(2)
    alive = encoder_gradient(torch.zeros(D_SAE, dtype=torch.bool))
    assert len(alive) and not alive.any()
    assert encoder_gradient(None).any()


@every
@pytest.mark.parametrize("through", ["json", "yaml"])
def test_config_round_trip(name, through):
    cfg = config(name)
    dump, load = {
        "json": (json.dumps, json.loads),
        "yaml": (yaml.safe_dump, yaml.safe_load),
    }[through]
    assert TrainingSAEConfig.from_dict(load(dump(cfg.to_dict()))) == cfg
    inference = cfg.get_inference_sae_cfg_dict()
    again = SAEConfig.from_dict(load(dump(inference)))
    assert load(dump(again.to_dict())) == load(dump({**again.to_dict(), **inference}))


@pytest.mark.parametrize(
    "name", [name for name in OURS if "k" in CASES[name].settings and name != "mp"]
)
@pytest.mark.parametrize("k", [0, -1, D_SAE + 1])
def test_more_active_latents_than_there_are_and_none_are_refused(name, k):
    """Of `mp`, which may choose an atom again, k is the number of steps."""
    with pytest.raises(ConfigError, match=rf"^k: .*given {k}; allowed"):
        config(
            name,
            **{**CASES[name].settings, "k": k, **({"ks": []} if name == "nested_topk" else {})},
        )


@every
def test_saved_and_loaded_it_gives_the_same_output(name, tmp_path):
    sae = trained(name)
    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert loaded.cfg.architecture() == (CASES[name].saved_as or name)
    assert loaded.cfg.metadata.training_architecture == name
    x = planted(BATCH, seed=50)
    with torch.no_grad():
        if CASES[name].same_at_inference:
            torch.testing.assert_close(loaded(x), sae(x), atol=1e-5, rtol=1e-4)
        else:
            l0 = (loaded.encode(x) != 0).float().sum(1).mean()
            assert 0.3 * sae.cfg.k < l0 < 3 * sae.cfg.k


@ours_only
def test_metadata_of_an_own_architecture_require_taxolens(name, tmp_path):
    sae = build(name)
    sae.save_inference_model(tmp_path)
    metadata = json.loads((tmp_path / "cfg.json").read_text())["metadata"]
    expected = None if CASES[name].saved_as else "taxolens"
    assert metadata.get("requires_plugin") == expected
    assert (ARCHITECTURES[name].sae_class is None) == (CASES[name].saved_as is not None)


@every
@pytest.mark.parametrize("kind", ["in training", "saved", "layer_norm", "hook_z", "b_dec kept"])
def test_the_untrained_twin_differs_in_its_weights_only(name, kind, tmp_path):
    sae = trained(name)
    if kind != "in training":
        _, file = sae.save_inference_model(tmp_path)
        changes = {
            "layer_norm": {"normalize_activations": "layer_norm"},
            "hook_z": {"reshape_activations": "hook_z"},
            "b_dec kept": {"apply_b_dec_to_input": False},
        }
        saved = json.loads(file.read_text()) | changes.get(kind, {})
        file.write_text(json.dumps(saved))
        sae = SAE.load_from_disk(tmp_path)
    before = {key: tensor.clone() for key, tensor in sae.state_dict().items()}
    x = planted(500, seed=60) + 3
    latents = SAELatents(sae)
    first, again, other = (TwinLatents.fit(latents, x, draw=draw) for draw in (0, 0, 1))
    assert type(first.sae) is type(sae) and first.d_sae == D_SAE
    assert first.sae.cfg.to_dict().keys() == sae.cfg.to_dict().keys()
    with torch.no_grad():
        z, decoded = first.reconstruct(x)
        assert z.shape == (500, D_SAE) and decoded.shape == x.shape
        assert torch.equal(z, again.encode(x)) and torch.equal(z, first.encode(x))
        assert not torch.equal(z, other.encode(x))
        wanted = (latents.encode(x) != 0).sum(1).float().mean()
        # Those of `tree` and `hsae` have as many latents as their config and their parents let fire.
        tolerance = {"tree": 0.5, "hsae": 0.1}.get(name, 0.05)
        assert (z != 0).sum(1).float().mean() == pytest.approx(float(wanted), rel=tolerance)
        error = (x - decoded).square().sum()
        if kind != "b_dec kept" or "b_enc" in before or "b_gate" in before:
            assert error <= (x - x.mean(0)).square().sum() * 1.05
        for other_scale in (0.95, 1.05):
            twin = TwinLatents(first.sae, None, x)
            twin.scale = first.scale * other_scale
            assert error <= (x - twin.reconstruct(x)[1]).square().sum()
    assert all(torch.equal(before[key], tensor) for key, tensor in sae.state_dict().items())


@every
@pytest.mark.parametrize(
    "kind",
    [
        "in training",
        "scaled",
        "whitened",
        "saved",
        "layer_norm",
        "constant_norm_rescale",
        "b_dec kept",
    ],
)
def test_decoder_rows_add_up_to_the_reconstruction(name, kind, tmp_path):
    """Rows of length other than 1, of an SAE that divides by them too; inputs that it normalises."""
    starts_at_data = name.startswith("archetypal")
    sae = trained(name, **({} if starts_at_data else {"decoder_init_norm": 2.0}))
    scaler = ActivationScaler(scaling_factor=0.5) if kind == "scaled" else ActivationScaler()
    if kind == "whitened":
        matrix = torch.diag(torch.linspace(0.5, 2, D_IN, dtype=torch.float64))
        mean = torch.ones(D_IN, dtype=torch.float64)
        scaler = ActivationScaler(whitening=ActivationWhitening(mean, matrix, matrix.inverse()))
    if kind in ("saved", "layer_norm", "constant_norm_rescale", "b_dec kept"):
        _, file = sae.save_inference_model(tmp_path)
        changes = {"apply_b_dec_to_input": False} if kind == "b_dec kept" else {}
        if kind in ("layer_norm", "constant_norm_rescale"):
            changes = {"normalize_activations": kind}
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        sae = SAE.load_from_disk(tmp_path)
    latents = SAELatents(sae, scaler)
    x = (
        planted(BATCH, seed=70)
        + torch.randn(BATCH, D_IN, generator=torch.Generator().manual_seed(7))
        + 3
    )
    with torch.no_grad():
        z, decoded = latents.reconstruct(x)
        seen = latents.as_decoded(x)
        unit = spread(x) / spread(seen)
        added = unit[:, None] * (z @ latents.W_dec + latents.b_dec - seen)
    assert (z != 0).any() and torch.equal(seen, x) == (kind not in NORMALISING)
    torch.testing.assert_close(x + added, decoded, atol=1e-4, rtol=1e-4)


def test_rows_of_a_decoder_that_is_none_of_these_are_read_or_left_out(caplog):
    class Halved(StandardSAE):
        """Every second latent counts half."""

        def decode(self, feature_acts):
            counts = torch.where(torch.arange(D_SAE) % 2 == 0, 1.0, 0.5)
            return super().decode(feature_acts * counts)

    class Squared(StandardSAE):
        def decode(self, feature_acts):
            return super().decode(feature_acts.square())

    cfg = StandardSAEConfig(d_in=D_IN, d_sae=D_SAE)
    halved, squared = Halved(cfg), Squared(cfg)
    for sae in (halved, squared):
        with torch.no_grad():
            sae.W_dec.normal_(generator=torch.Generator().manual_seed(0))
    rows = SAELatents(halved).W_dec
    torch.testing.assert_close(rows[::2], halved.W_dec.data[::2])
    torch.testing.assert_close(rows[1::2], halved.W_dec.data[1::2] / 2)
    assert not caplog.records and SAELatents(squared).W_dec is None
    assert "standard: its reconstruction is not linear in the latents" in caplog.text


TIED = {"mp", "omp", "matching_pursuit", "codebook"}
COMPUTED = {"archetypal_topk", "archetypal_jumprelu"}
ENCODER = {"W_enc", "b_enc", "b_gate", "b_mag", "r_mag"}


def cosines(rows: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    return torch.cosine_similarity(rows.double(), first.double(), dim=1)


@every
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_a_control_keeps_its_decoder_or_encoder_and_trains_the_rest(name, constraint):
    sae = build(name)
    if name in TIED | COMPUTED:
        part = "W_enc" if name in TIED else "W_dec"
        with pytest.raises(ConfigError, match=f"possible for {name}, .* {part} is not a parameter"):
            Constraint(sae, constraint)
        return
    first = {key: parameter.detach().clone() for key, parameter in sae.named_parameters()}
    held = ENCODER if constraint == "frozen_encoder" else {"W_dec"}
    lr = 0.5 if name == "simplicial" else 5e-2  # its rows are longer
    trainer = trainer_for(sae, [planted(BATCH, seed) for seed in range(12)], lr=lr)
    control = Constraint(sae, constraint)
    control.start(trainer.optimizer)
    for _ in range(12):
        trainer.step(next(trainer.data_provider))
        if constraint == "soft_frozen_decoder":
            assert (cosines(sae.W_dec, first["W_dec"]) > 0.8 - 1e-6).all()
    for key, parameter in sae.named_parameters():
        if key in held and constraint != "soft_frozen_decoder":
            assert torch.equal(parameter, first[key]), key
        elif key in held:
            assert not torch.equal(parameter, first[key])
            assert (cosines(parameter, first[key]) < 0.8 + 1e-5).any(), "the bound was reached"
        elif parameter.requires_grad and first[key].numel() > 1:
            # b_gate and the like have gradients only near their threshold.
            assert not torch.equal(parameter, first[key]) or key in ("r_mag", "b_mag"), key


def test_soft_rows_move_to_the_nearest_allowed_direction():
    generator = torch.Generator().manual_seed(0)
    first, rows = torch.randn(2, 200, 3, generator=generator)
    found = within_cosine(rows, first)
    torch.testing.assert_close(found.norm(dim=1), rows.norm(dim=1))
    kept = cosines(rows, first) > 0.8
    assert torch.equal(found[kept], rows[kept]) and 0 < kept.sum() < 200
    # Brute force: of all directions at the bound, none is nearer to the row.
    angle = torch.linspace(0, 2 * torch.pi, 3601)
    for row, u, best in zip(rows[~kept], first[~kept], found[~kept]):
        u = u / u.norm()
        a = torch.linalg.cross(u, row / row.norm())
        a = a / a.norm()
        b = torch.linalg.cross(u, a)
        circle = 0.8 * u + 0.6 * (angle.cos()[:, None] * a + angle.sin()[:, None] * b)
        nearest = (circle @ row).max()
        torch.testing.assert_close(best @ row / row.norm(), nearest, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(best @ u / best.norm(), torch.tensor(0.8), atol=1e-5, rtol=0)
    assert torch.equal(within_cosine(-2 * torch.eye(3), torch.eye(3)), 2 * torch.eye(3))
    assert torch.equal(within_cosine(torch.zeros(2, 3), first[:2]), torch.zeros(2, 3))


@every
def test_a_training_checkpoint_loads_as_a_training_sae(name, tmp_path):
    sae = trained(name)
    sae.save_model(tmp_path)
    loaded = TrainingSAE.load_from_disk(tmp_path).eval()
    assert type(loaded) is type(sae)
    x = planted(BATCH, seed=50)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), sae(x))


@every
@pytest.mark.parametrize("device", DEVICES)
def test_resumed_and_repeated_training_are_the_same_to_the_bit(name, device, tmp_path):
    if name == "top_afa" and device == "cuda":
        pytest.skip("torch.cumsum of floats has no deterministic form on CUDA")
    batches = [planted(BATCH, seed).to(device) for seed in range(8)]

    def trainer(seed, checkpoint_path=None, n_checkpoints=0):
        sae = build(name, seed, device=device)
        torch.manual_seed(seed + 1)  # nothing may hang on the global generator
        settings = {"n_checkpoints": n_checkpoints, "device": device}
        return trainer_for(sae, batches, checkpoint_path, CASES[name].lr, **settings)

    with repeatable_on(device):
        straight = trainer(0, tmp_path, n_checkpoints=1).fit()
        (checkpoint,) = tmp_path.iterdir()
        done = int(checkpoint.name) // BATCH
        rest = trainer(7)
        rest.data_provider = iter(batches[done:])
        rest.load_trainer_state(checkpoint)
        rest.sae.load_weights_from_checkpoint(checkpoint)
        others = {"resumed": rest.fit(), "repeated": trainer(0).fit()}

    expected = straight.state_dict()
    for kind, other in others.items():
        got = other.state_dict()
        assert expected.keys() == got.keys()
        for key, value in expected.items():
            assert torch.equal(value, got[key]), f"{kind} {key}"


@every
def test_folding_the_activation_norm_keeps_the_function(name):
    sae = trained(name, normalize_activations="expected_average_only_in")
    folded = copy.deepcopy(sae)
    folded.fold_activation_norm_scaling_factor(0.5)
    assert folded.cfg.normalize_activations == "none"
    x = planted(BATCH, seed=50)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), sae(x * 0.5) / 0.5, atol=1e-5, rtol=1e-4)


@every
def test_folding_the_activation_norm_keeps_what_is_saved(name, tmp_path):
    """BatchTopK's threshold is used by the saved SAE alone, and must be folded too."""
    sae = trained(name, normalize_activations="expected_average_only_in")
    sae.save_inference_model(tmp_path / "scaled")
    sae.fold_activation_norm_scaling_factor(0.5)
    sae.save_inference_model(tmp_path / "folded")
    scaled, folded = (SAE.load_from_disk(tmp_path / kind) for kind in ("scaled", "folded"))
    x = planted(BATCH, seed=50)
    with torch.no_grad():
        assert torch.equal(folded.encode(x) != 0, scaled.encode(x * 0.5) != 0)
        torch.testing.assert_close(folded(x), scaled(x * 0.5) / 0.5, atol=1e-5, rtol=1e-4)


@every
def test_folding_whitening_keeps_the_function_or_is_refused(name):
    if not CASES[name].whitening:
        with pytest.raises(ValueError, match="covariance_whitening"):
            config(name, normalize_activations="covariance_whitening")
        with pytest.raises(NotImplementedError, match=r"(?i)whitening"):
            build(name).fold_activation_whitening(torch.zeros(D_IN), *2 * [torch.eye(D_IN)])
        return
    sae = trained(name, normalize_activations="covariance_whitening")
    generator = torch.Generator().manual_seed(5)
    basis = torch.linalg.qr(torch.randn(D_IN, D_IN, generator=generator, dtype=torch.float64)).Q
    scale = torch.linspace(0.5, 2, D_IN, dtype=torch.float64)
    mean = torch.randn(D_IN, generator=generator, dtype=torch.float64)
    whiten, unwhiten = basis * scale, (basis / scale).T
    folded = copy.deepcopy(sae)
    folded.fold_activation_whitening(mean, whiten, unwhiten)
    # what is not finite would be refused, as diverged, when the trained SAE is saved
    assert all(tensor.isfinite().all() for tensor in folded.state_dict().values())
    x = planted(BATCH, seed=50).double()
    white = ((x - mean) @ whiten).float()
    with torch.no_grad():
        expected = sae(white).double() @ unwhiten + mean
        torch.testing.assert_close(folded(x.float()).double(), expected, atol=1e-4, rtol=1e-4)


@every
def test_folding_decoder_norms_keeps_the_function_or_is_refused(name):
    sae = trained(name)
    folded = copy.deepcopy(sae)
    if not CASES[name].fold_W_dec_norm:
        with pytest.raises(NotImplementedError, match="norm"):
            folded.fold_W_dec_norm()
        return
    folded.fold_W_dec_norm()
    torch.testing.assert_close(folded.W_dec.norm(dim=1), torch.ones(D_SAE))
    x = planted(BATCH, seed=50)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), sae(x), atol=1e-5, rtol=1e-4)


@every
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_loss_falls_on_a_planted_dictionary(name, device, autocast):
    case = CASES[name]
    sae = with_sparse_step(build(name, device=device, **(SPARSE.get(name, {}) if autocast else {})))
    steps = case.needs_samples_for_loss
    batches = [planted(BATCH, seed).to(device) for seed in range(steps)]
    trainer = trainer_for(sae, batches, lr=case.lr, device=device, autocast=autocast)
    losses = [float(trainer.step(x).losses["mse_loss"]) for x in batches]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert all(torch.isfinite(value).all() for value in sae.state_dict().values())


@every
def test_hook_points_fire(name):
    sae = build(name)
    expected = {hook for hook in sae.hook_dict if hook != "hook_sae_error"}
    with torch.no_grad():
        out, cache = sae.run_with_cache(planted(6))
    assert expected - set(cache) == CASES[name].silent_hooks
    torch.testing.assert_close(cache["hook_sae_output"], out)
    if "hook_sae_acts_post" in cache:
        assert cache["hook_sae_acts_post"].shape == (6, D_SAE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae.use_error_term = True
    with torch.no_grad():
        out, cache = sae.run_with_cache(planted(6))
    assert "hook_sae_error" in cache
    torch.testing.assert_close(out, planted(6), atol=1e-5, rtol=1e-4)


@ours_only
def test_ablating_a_latent_by_hook_changes_the_output(name):
    sae = trained(name)
    x = planted(32, seed=50)
    with torch.no_grad():
        latent = int(sae.encode(x).abs().sum(0).argmax())

        def ablate(acts: torch.Tensor, hook: Any) -> torch.Tensor:
            acts = acts.clone()
            acts[..., latent] = 0
            return acts

        ablated = sae.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_post", ablate)])
        assert not torch.allclose(ablated, sae(x))


@every
def test_spliced_into_a_vision_model_and_out_again(name, tmp_path):
    model, images, hook = tapped("vit"), pictures(), "blocks.0.hook_resid_post"
    # norms of 1 where they can be chosen, so that one latent shows in what the model gives
    loud = {} if config(name).decoder_init_norm is None else {"decoder_init_norm": 1.0}
    made = build(name, d_in=model.cfg.d_model, **loud).eval()
    made.cfg.metadata.hook_name = hook
    made.save_inference_model(tmp_path)
    sae = SAE.load_from_disk(tmp_path)

    def ablate(acts: torch.Tensor, hook: Any = None) -> torch.Tensor:
        return acts * (torch.arange(D_SAE) != latent)

    with torch.no_grad():
        untouched = model(images)
        x = run_to_hooks(model, images, [hook])[hook]
        acts = sae.encode(x)
        latent = int(acts.abs().sum((0, 1)).argmax())
        assert acts[..., latent].any()

        model.add_sae(sae)
        spliced = model(images)
        model.reset_saes()
        expected = model_from(model, hook, sae(x), images)
        assert not torch.allclose(spliced, untouched, atol=1e-3)
        torch.testing.assert_close(spliced, expected)

        model.add_sae(sae, use_error_term=True)
        torch.testing.assert_close(model(images), untouched, rtol=1e-4, atol=1e-4)
        model.reset_saes()

        if not CASES[name].silent_hooks:
            # SAELens's matching pursuit has no hook on its codes; the trained `mp` has.
            model.add_sae(made if name == "mp" else sae, use_error_term=True)
            point = f"{hook}.hook_sae_acts_post"
            ablated = model.run_with_hooks(images, fwd_hooks=[(point, ablate)])
            model.reset_saes()
            without = x - sae.decode(acts) + sae.decode(ablate(acts))
            expected = model_from(model, hook, without, images)
            assert not torch.allclose(ablated, untouched, atol=1e-3)
            torch.testing.assert_close(ablated, expected, rtol=1e-4, atol=1e-4)

        assert model.acts_to_saes == {}
        assert torch.equal(model(images), untouched)


def model_from(model: Any, hook: str, x: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """What the model gives with `x` in the place of its activations at `hook`."""
    return model.run_with_hooks(images, fwd_hooks=[(hook, lambda *_, **__: x)])


@every
def test_the_meta_device(name):
    sae = build(name, device="meta")
    assert {p.device.type for p in sae.parameters()} == {"meta"}
    if name in OURS:
        assert sae.decode(sae.encode(torch.empty(5, D_IN, device="meta"))).shape == (5, D_IN)


@every
@pytest.mark.parametrize("device", [CUDA])
def test_cuda_agrees_with_the_cpu(name, device):
    sae = trained(name)
    x = planted(BATCH, seed=50)
    with torch.no_grad():
        expected = sae(x)
        got = sae.to(device)(x.to(device)).cpu()
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_text(tmp_path_factory.mktemp("text"), width=D_IN)


def text_flags(name: str, text: Path, output: Path) -> list[str]:
    """SAELens's command line for a few steps of `name` on the tiny text model."""
    flags: dict[str, Any] = {
        "architecture": name,
        "d_in": D_IN,
        "d_sae": D_SAE,
        **CASES[name].settings,
        "model_class_name": "AutoModelForCausalLM",
        "model_name": text / "model",
        "hook_name": "transformer.h.0",
        "dataset_path": text / "sentences",
        "is_dataset_tokenized": False,
        "streaming": False,
        "context_size": 16,
        "store_batch_size_prompts": 4,
        "n_batches_in_buffer": 8,
        "train_batch_size_tokens": BATCH,
        "training_tokens": 4 * BATCH,
        "dead_feature_window": 2,
        "log_to_wandb": False,
        "output_path": output,
        "checkpoint_path": output / "checkpoints",
    }
    return [
        part
        for flag, value in flags.items()
        for part in (f"--{flag}", *map(str, value if isinstance(value, list) else [value]))
    ]


@ours_only
def test_the_command_line_of_saelens_trains_it_on_text(name, tiny_text, tmp_path):
    _run_cli(text_flags(name, tiny_text, tmp_path))
    sae = SAE.load_from_disk(tmp_path)
    assert sae.cfg.architecture() == (CASES[name].saved_as or name)
    assert sae.cfg.metadata.training_architecture == name
    assert sae.cfg.metadata.hook_name == "transformer.h.0"
    torch.manual_seed(42)  # the runner's seed
    untrained = get_sae_training_class(name)[0](config(name))
    assert not torch.allclose(sae.W_dec, untrained.W_dec)
    with torch.no_grad():
        assert torch.isfinite(sae(planted(6))).all()


def test_the_command_line_of_saelens_in_a_process_of_its_own(tiny_text, tmp_path, forks):
    """As the docs have it: SAELens's module, run after `import taxolens`."""
    run = "import runpy, taxolens; runpy.run_module('sae_lens.llm_sae_training_runner', run_name='__main__')"
    done = forks.run(run, *text_flags("mp", tiny_text, tmp_path))
    assert done.returncode == 0, done.stderr
    assert SAE.load_from_disk(tmp_path).cfg.metadata.training_architecture == "mp"


def test_without_this_package_built_ins_load_and_the_others_say_what_they_need(tmp_path, forks):
    x = planted(BATCH, seed=50)
    torch.save(x, tmp_path / "x.pt")
    for name in OURS:
        trained(name).save_inference_model(tmp_path / name)
        with torch.no_grad():
            torch.save(SAE.load_from_disk(tmp_path / name)(x), tmp_path / name / "expected.pt")
    script = """
        import json, sys, torch
        from pathlib import Path
        from sae_lens import SAE
        folder = Path(sys.argv[1])
        x = torch.load(folder / "x.pt")
        for path in sorted(p for p in folder.iterdir() if p.is_dir()):
            cfg = json.loads((path / "cfg.json").read_text())
            if cfg["metadata"].get("requires_plugin"):
                try:
                    SAE.load_from_disk(path)
                except KeyError as error:
                    print(path.name, "needs", cfg["metadata"]["requires_plugin"], error)
                continue
            with torch.no_grad():
                out = SAE.load_from_disk(path)(x)
            torch.testing.assert_close(out, torch.load(path / "expected.pt"))
            print(path.name, "loads")
        assert not any(module.startswith("taxolens") for module in sys.modules)
    """
    done = forks.run(script, tmp_path)
    assert done.returncode == 0, done.stderr
    expected = [
        f"{name} loads" if CASES[name].saved_as else f"{name} needs taxolens {name!r}"
        for name in sorted(OURS)
    ]
    assert done.stdout.splitlines() == expected


def test_every_registered_architecture_is_under_contract():
    assert set(ARCHITECTURES) <= set(CASES)
