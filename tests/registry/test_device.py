"""Evaluators on a device other than the CPU: the same numbers; no firing is moved in a counting pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import taxolens
import torch
from evaluators import COUNT_BASED
from far_device import DEVICE, FAR_DEVICES, FarDevice, is_far, on
from taxolens.registry.evaluators.base import EvaluationBatch, EvaluationContext, Pass
from taxolens.registry.evaluators.parts import cells
from taxolens.registry.evaluators.parts.cells import CellCounts
from torch import Tensor

N_IMAGES, N_LATENTS, BATCH = 240, 40, 60


def batches(tree: taxolens.Taxonomy) -> Iterator[EvaluationBatch]:
    """Latents that know one or two classes, and false alarms; the fit half first."""
    generator = torch.Generator().manual_seed(0)
    n_classes = len(tree.classes)
    labels = torch.arange(N_IMAGES) % n_classes
    shuffled = labels[torch.randperm(N_IMAGES, generator=generator)]
    known = torch.rand(N_LATENTS, n_classes, generator=generator) < 0.15
    z = torch.randn(N_IMAGES, N_LATENTS, generator=generator)
    odds = torch.where(known.T[labels], 0.8, 0.1)
    z *= torch.rand(z.shape, generator=generator) < odds  # some are below 0
    x = torch.randn(N_IMAGES, 8, generator=generator)
    for index in torch.arange(N_IMAGES).split(BATCH):
        is_fit = index < N_IMAGES // 2
        yield EvaluationBatch(x[index], z[index], labels[index], shuffled[index], index, is_fit)


def start(tree: taxolens.Taxonomy, names: Iterable[str], device: Any = "cpu") -> Pass:
    W_dec = torch.randn(N_LATENTS, 8, generator=torch.Generator().manual_seed(1)).to(device)

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        z = (x @ W_dec.T).relu()
        return z, z @ W_dec

    context = EvaluationContext(
        tree,
        N_IMAGES,
        8,
        N_LATENTS,
        n_permutations=2,
        class_counts=np.full(len(tree.classes), N_IMAGES // len(tree.classes)),
        W_dec=W_dec,
        b_dec=torch.zeros(8, device=device),
        reconstruct=reconstruct,
    )
    shorter = {"meta_sae": {"steps": 20}}
    return Pass(context, {n: (taxolens.EVALUATORS[n], shorter.get(n)) for n in names})


def far_batch(batch: EvaluationBatch, device: str) -> EvaluationBatch:
    embedding = None if batch.embedding is None else batch.embedding.to(device)
    return dataclasses.replace(
        batch, x=batch.x.to(device), z=batch.z.to(device), embedding=embedding
    )


def numbers(done: Pass) -> dict[str, list[dict[str, float] | None]]:
    draws = [{}, {"shuffled": True}, *({"permutation": p} for p in done.context.permutations)]
    names = list(done.evaluators)
    found = {name: [done.compute(name, **draw) for draw in draws] for name in names}
    assert not done.errors
    return found


@pytest.mark.parametrize("device", FAR_DEVICES)
@pytest.mark.parametrize("name", [name for name in taxolens.EVALUATORS if name not in COUNT_BASED])
def test_numbers_equal_those_of_the_cpu(animals: taxolens.Taxonomy, name: str, device: str) -> None:
    """A tensor on the wrong device is an error on CUDA, as on the simulated device."""
    of_images = [dataclasses.replace(b, embedding=b.x[:, :4]) for b in batches(animals)]
    here = start(animals, [name])
    here.calibrate(of_images[0])
    for batch in of_images:
        here.update(batch)
    with on(device):
        there = start(animals, [name], device)
        there.calibrate(far_batch(of_images[0], device))
        for batch in of_images:
            there.update(far_batch(batch, device))
        found = numbers(there)[name]
    # By rounding a vote among neighbours may change, of one of 120 images.
    rel, within = (1e-4, 1e-6) if is_far(device) else (0.01, 0.01)
    for one, other in zip(found, numbers(here)[name], strict=True):
        assert one == pytest.approx(other, rel=rel, abs=within, nan_ok=True)


@pytest.mark.parametrize("device", FAR_DEVICES)
@pytest.mark.parametrize("small", [0, cells.SMALL])
def test_numbers_equal_those_of_the_cpu_and_no_firing_is_moved(
    animals: taxolens.Taxonomy, monkeypatch: pytest.MonkeyPatch, small: int, device: str
) -> None:
    monkeypatch.setattr(cells, "BUFFER", 10)
    monkeypatch.setattr(cells, "SMALL", small)
    here, there = start(animals, COUNT_BASED), start(animals, COUNT_BASED)
    for batch in batches(animals):
        if not here.context.batches:
            here.calibrate(batch)
        here.update(batch)
    with on(device) as context:
        moved = context.moved if isinstance(context, FarDevice) else []
        for batch in batches(animals):
            far = far_batch(batch, device)
            assert len(far.firings.rows) > 2 * len(batch)
            if not there.context.batches:
                there.calibrate(far)
            moved.clear()
            there.update(far)
            assert max(moved, default=0) <= len(batch)
        found = numbers(there)
    rel = None if is_far(device) else 1e-3
    for name, expected in numbers(here).items():
        for one, other in zip(found[name], expected):
            assert one == pytest.approx(other, rel=rel, nan_ok=True), name


@pytest.mark.parametrize("device", ["cpu", *FAR_DEVICES])
@pytest.mark.parametrize(("share", "small"), [(0.02, 0), (2.0, 0), (2.0, 10**6)])
def test_cells_are_counted(
    monkeypatch: pytest.MonkeyPatch, share: float, small: int, device: str
) -> None:
    """Whether few cells or most have a count, in one part or in many; or in an array at once."""
    monkeypatch.setattr(cells, "BUFFER", 50)
    monkeypatch.setattr(cells, "SMALL", small)
    rng = np.random.default_rng(0)
    n_cells, total = 500, np.zeros(500, dtype=int)
    counts = CellCounts(n_cells, torch.uint8)
    with on(device):
        assert [len(column) for column in counts.read()] == [0, 0]
        for part in range(10):
            added = rng.integers(0, max(1, int(share * n_cells / 2)), 30) % n_cells
            total += np.bincount(added, minlength=n_cells)
            counts.add(torch.from_numpy(added).to(device))
            if part % 4 == 3:
                found, often = counts.read()
                assert found.tolist() == np.flatnonzero(total).tolist()
                assert often.tolist() == total[total > 0].tolist()


def test_a_copy_is_counted_and_a_mixture_refused() -> None:
    """The simulated device itself."""
    with FarDevice() as device:
        far = torch.arange(6).to(DEVICE)
        assert far.device == DEVICE and torch.zeros(2, device=far.device).device == DEVICE
        assert (far + far).cpu().tolist() == [0, 2, 4, 6, 8, 10] and device.moved == [6]
        with pytest.raises(RuntimeError, match="tensors on two devices"):
            far + torch.arange(6)
        with pytest.raises(RuntimeError, match="not supported"):
            far.numpy()
