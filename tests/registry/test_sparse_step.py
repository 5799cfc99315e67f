"""The sparse step of top-k architectures against SAELens's dense one, and its selection against torch.topk."""

from __future__ import annotations

import json

import pytest
import torch
from far_device import DEVICES
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig, TrainStepInput
from safetensors.torch import load_file
from taxolens.registry.architectures.parts.sparse_step import (
    SparseStep,
    largest_of_batch,
    largest_of_rows,
    runs_on,
    with_sparse_step,
)

D_IN, D_SAE, K, N = 12, 64, 4, 40
ARCHITECTURES = {
    "topk": {},
    "batchtopk": {},
    "matryoshka_batchtopk": {"matryoshka_widths": [8, 24, 64]},
    "nested_topk": {"ks": [1, 2, 4]},
    "random_matryoshka": {"n_prefixes": 4},
}
BY_NAME = pytest.mark.parametrize("architecture", ARCHITECTURES)
ON = pytest.mark.parametrize("device", DEVICES)


def pair(architecture: str, on: str = "cpu", **settings) -> tuple[TrainingSAE, TrainingSAE]:
    """The same SAE with SAELens's dense step and with the sparse one."""
    config = {"architecture": architecture, "d_in": D_IN, "d_sae": D_SAE, "k": K}
    config |= {**ARCHITECTURES[architecture], **settings}
    saes = []
    for enabled in (False, True):
        torch.manual_seed(0)
        sae = TrainingSAE.from_dict(TrainingSAEConfig.from_dict(config).to_dict())
        with torch.no_grad():
            sae.b_enc += 0.1 * torch.randn(D_SAE)
            sae.b_dec += 0.1 * torch.randn(D_IN)
            sae.W_dec *= 1 + torch.rand(D_SAE, 1)
        saes.append(with_sparse_step(sae.to(on), enabled))
    return saes[0], saes[1]


def inputs(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(N, D_IN, generator=torch.Generator().manual_seed(1)).to(dtype)


def forward(sae: TrainingSAE, x: torch.Tensor, dead: torch.Tensor | None = None):
    step = TrainStepInput(
        sae_in=x,
        coefficients={},
        dead_neuron_mask=dead,
        n_training_steps=0,
        is_logging_step=False,
    )
    return sae.training_forward_pass(step)


@BY_NAME
@ON
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("n_dead", [0, 3, 20, 60])
@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_loss_and_gradients_are_those_of_the_dense_step(
    architecture, device, rescale, n_dead, apply_b_dec
):
    """With fewer dead latents than the auxiliary loss takes (d/2 = 6), with some more, and with most dead."""
    settings = {"rescale_acts_by_decoder_norm": rescale, "apply_b_dec_to_input": apply_b_dec}
    dense, sparse = pair(architecture, device, **settings)
    assert isinstance(sparse, SparseStep)
    dead = torch.randperm(D_SAE, generator=torch.Generator().manual_seed(2)) < n_dead
    x, dead = inputs().to(device), dead.to(device)
    outputs = [forward(sae, x, dead) for sae in (dense, sparse)]
    assert torch.equal(outputs[0].feature_acts, outputs[1].feature_acts.to_dense())
    assert torch.equal(outputs[0].hidden_pre, outputs[1].hidden_pre)
    torch.testing.assert_close(outputs[0].sae_out, outputs[1].sae_out)
    assert outputs[0].losses.keys() == outputs[1].losses.keys()
    for name, loss in outputs[0].losses.items():
        torch.testing.assert_close(loss, outputs[1].losses[name], msg=name)
    for output in outputs:
        output.loss.backward()
    for name, parameter in dense.named_parameters():
        gradient = sparse.get_parameter(name).grad
        assert gradient is not None and parameter.grad.abs().max() > 0
        rtol = 1e-5 if device == "cpu" else 1e-4
        atol = rtol / 10 * float(parameter.grad.abs().max())
        torch.testing.assert_close(gradient, parameter.grad, rtol=rtol, atol=atol)


@BY_NAME
def test_the_encoder_has_no_dense_gradient_of_latents(architecture, monkeypatch):
    """The sparse step is taken: a dense product for the decoder would call decode's matmul."""
    _, sparse = pair(architecture)
    taken = []
    monkeypatch.setattr(
        "taxolens.registry.architectures.parts.sparse_step._dense_gradients",
        lambda *_: pytest.fail("dense gradients"),
    )
    original = SparseStep.encode_with_hidden_pre

    def watched(self, x):
        found = original(self, x)
        taken.append(self.firings is not None)
        return found

    monkeypatch.setattr(SparseStep, "encode_with_hidden_pre", watched)
    forward(sparse, inputs()).loss.backward()
    assert taken == [True] and sparse.firings is None


@BY_NAME
def test_the_auxiliary_loss_is_that_of_the_selected_latents(architecture, monkeypatch):
    """SAELens's own would multiply every dead latent."""
    _, sparse = pair(architecture)
    taken = []
    original = SparseStep._decoded_of_dead

    def watched(self, dead, *args):
        taken.append(len(dead))
        return original(self, dead, *args)

    monkeypatch.setattr(SparseStep, "_decoded_of_dead", watched)
    forward(sparse, inputs(), torch.arange(D_SAE) < 60).loss.backward()
    assert taken == [60]


@BY_NAME
def test_training_and_saved_files_are_those_of_the_architecture(architecture, tmp_path):
    dense, sparse = pair(architecture)
    for name, sae in (("dense", dense), ("sparse", sparse)):
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
        for _ in range(3):
            forward(sae, inputs()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        sae.save_inference_model(tmp_path / name)
        sae.save_model(tmp_path / f"{name}-training")
    for kind in ("", "-training"):
        folders = [tmp_path / f"{name}{kind}" for name in ("dense", "sparse")]
        configs = [json.loads((folder / "cfg.json").read_text()) for folder in folders]
        assert configs[0] == configs[1]
        weights = [load_file(folder / "sae_weights.safetensors") for folder in folders]
        assert weights[0].keys() == weights[1].keys()
        for key, value in weights[0].items():
            torch.testing.assert_close(weights[1][key], value, rtol=1e-4, atol=1e-5, msg=key)


@ON
@BY_NAME
def test_training_repeats_to_the_bit(architecture, device):
    """On CUDA by the kernels, which sum in a fixed order; torch's deterministic mode is off."""
    if device == "cuda":
        pytest.importorskip("triton")

    def trained() -> dict[str, torch.Tensor]:
        _, sae = pair(architecture, on=device)
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
        for step in range(20):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(512, D_IN, generator=generator).to(device)
            dead = torch.rand(D_SAE, generator=generator).to(device) < (0.9 if step % 2 else 0.1)
            forward(sae, x, dead).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return sae.state_dict()

    first, second = trained(), trained()
    assert all(torch.equal(second[key], value) for key, value in first.items())


def test_a_hook_on_the_latents_acts_as_in_saelens():
    dense, sparse = pair("topk")
    for sae in (dense, sparse):
        sae.hook_sae_acts_post.add_hook(lambda acts, hook: acts * 2)
    outputs = [forward(sae, inputs()) for sae in (dense, sparse)]
    assert torch.equal(outputs[0].sae_out, outputs[1].sae_out)
    for output in outputs:
        output.loss.backward()
    assert torch.equal(dense.W_enc.grad, sparse.W_enc.grad)


@pytest.mark.parametrize("call", ["encode", "forward"])
def test_inference_is_that_of_saelens(call):
    dense, sparse = pair("topk")
    with torch.no_grad():
        found = [getattr(sae, call)(inputs()) for sae in (dense, sparse)]
    assert torch.equal(*found)


def test_frozen_parts_get_no_gradient_and_others_theirs():
    dense, sparse = pair("topk")
    for sae in (dense, sparse):
        sae.W_dec.requires_grad_(False)
        forward(sae, inputs()).loss.backward()
    assert sparse.W_dec.grad is None
    torch.testing.assert_close(sparse.W_enc.grad, dense.W_enc.grad)
    dense, sparse = pair("topk")
    for sae in (dense, sparse):
        sae.W_enc.requires_grad_(False)
        sae.b_enc.requires_grad_(False)
        forward(sae, inputs()).loss.backward()
    assert sparse.W_enc.grad is None and sparse.b_enc.grad is None
    torch.testing.assert_close(sparse.W_dec.grad, dense.W_dec.grad)


@BY_NAME
@ON
@pytest.mark.parametrize("parameter", ["W_dec", "W_enc", "b_enc", "b_dec"])
def test_autocast_is_as_exact_as_the_dense_step(architecture, device, parameter):
    """Against float32 the loss and gradients of the sparse step err no more than those of the dense one."""
    x = inputs().to(device)
    exact, *saes = pair(architecture, device)[0], *pair(architecture, device)
    wanted = forward(exact, x).loss
    wanted.backward()
    gradient, errors = exact.get_parameter(parameter).grad, []
    for sae in saes:
        with torch.autocast(device, dtype=torch.bfloat16):
            output = forward(sae, x)
        output.loss.backward()
        torch.testing.assert_close(output.loss.float(), wanted, rtol=0.02, atol=0)
        found = sae.get_parameter(parameter).grad
        errors.append(float((found - gradient).norm() / gradient.norm()))
    assert errors[1] < max(0.1, 1.5 * errors[0])


def test_weights_in_bfloat16():
    dense, sparse = pair("topk", dtype="bfloat16")
    for sae in (dense, sparse):
        forward(sae, inputs(torch.bfloat16)).loss.backward()
    assert sparse.W_enc.grad.dtype == torch.bfloat16
    torch.testing.assert_close(sparse.W_enc.grad, dense.W_enc.grad, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("rescale", [True, False])
def test_gradients_in_half_precision_are_those_in_float64(dtype, rescale):
    """Of latents that fire on each of 2,000 inputs: sums of that many terms stop growing in half precision."""
    x = (torch.randn(2000, D_IN, generator=torch.Generator().manual_seed(1)) + 0.7).bfloat16()
    settings = {"dtype": dtype, "rescale_acts_by_decoder_norm": rescale}
    exact, sparse = pair("topk", dtype="float64")[0], pair("topk", **settings)[1]
    exact.cfg.rescale_acts_by_decoder_norm = rescale
    with torch.no_grad():
        sparse.W_enc[:, :2] += 0.5
        for parameter, own in zip(exact.parameters(), sparse.parameters(), strict=True):
            parameter.copy_(own)
    forward(exact, x.double()).loss.backward()
    output = forward(sparse, x.to(sparse.dtype))
    assert int((output.feature_acts != 0).sum(0).max()) > 1500
    output.loss.backward()
    for name, parameter in exact.named_parameters():
        found = sparse.get_parameter(name).grad.double()
        assert float((found - parameter.grad).norm() / parameter.grad.norm()) < 0.04, name


@BY_NAME
@pytest.mark.parametrize("n_dead", [0, 60])
@pytest.mark.parametrize("rescale", [True, False])
def test_gradients_in_float64_are_exact(architecture, n_dead, rescale):
    dense, sparse = pair(architecture, dtype="float64", rescale_acts_by_decoder_norm=rescale)
    dead = torch.arange(D_SAE) < n_dead
    for sae in (dense, sparse):
        forward(sae, inputs(torch.float64), dead).loss.backward()
    for name, parameter in dense.named_parameters():
        gradient, expected = sparse.get_parameter(name).grad, parameter.grad
        error = float((gradient - expected).norm() / expected.norm())
        assert error < 1e-13, name


def test_deterministic_training_on_cuda_is_dense():
    cpu, cuda, mps = (torch.device(kind) for kind in ("cpu", "cuda", "mps"))
    assert runs_on(cpu) and runs_on(cuda) and not runs_on(mps)
    torch.use_deterministic_algorithms(True)
    try:
        assert runs_on(cpu) and not runs_on(cuda)
    finally:
        torch.use_deterministic_algorithms(False)


def test_wide_codes_and_other_architectures_are_left_alone():
    _, sparse = pair("topk", k=32)
    with sparse.stepping(TrainStepInput(inputs(), {}, None, 0, False)) as is_sparse:
        assert not is_sparse
    standard = TrainingSAE.from_dict(
        TrainingSAEConfig.from_dict({"architecture": "standard", "d_in": 4, "d_sae": 8}).to_dict()
    )
    assert with_sparse_step(standard) is standard


@ON
@settings(deadline=None)  # the first call on CUDA starts it
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(2, 60), st.floats(0.5, 8))
def test_the_largest_of_a_batch_are_those_of_torch(device, seed, n, m, k):
    k = min(k, m)
    pre = torch.randn(n, m, generator=torch.Generator().manual_seed(seed)).to(device)
    fired = largest_of_batch(pre, k)
    wanted = pre.relu().flatten().topk(int(k * n)).values
    assert torch.equal(fired.values.sort(descending=True).values, wanted[wanted > 0])
    dense = fired.dense()
    assert torch.equal(dense[dense > 0].sort().values, fired.values.sort().values)
    assert torch.equal(dense[dense > 0], pre[dense > 0])


@ON
def test_the_estimated_threshold_of_a_large_batch_loses_nothing(device):
    generator = torch.Generator().manual_seed(0)
    for spread in (1.0, 0.01):  # with rows of different height the sample is less typical
        height = torch.rand(512, 1, generator=generator) * (1 - spread) + spread
        pre = (torch.randn(512, 1024, generator=generator) * height).to(device)
        wanted = pre.flatten().topk(16 * 512).values
        fired = largest_of_batch(pre, 16.0)
        assert torch.equal(fired.values.sort(descending=True).values, wanted)


@given(st.integers(0, 10_000), st.integers(1, 20), st.integers(4, 40), st.integers(1, 4))
def test_firings_of_rows_split_by_width(seed, n, m, k):
    pre = torch.randn(n, m, generator=torch.Generator().manual_seed(seed))
    fired = largest_of_rows(pre, k)
    W_dec = torch.randn(m, 3, generator=torch.Generator().manual_seed(seed + 1))
    cut = m // 2
    dense = torch.zeros(n, m).scatter(1, pre.topk(k).indices, pre.topk(k).values.relu())
    assert torch.equal(fired.dense(), dense)
    torch.testing.assert_close(fired.decoded(W_dec), dense @ W_dec)
    for start, stop in ((0, cut), (cut, m)):
        part = fired.between(start, stop).decoded(W_dec)
        torch.testing.assert_close(part, dense[:, start:stop] @ W_dec[start:stop])
