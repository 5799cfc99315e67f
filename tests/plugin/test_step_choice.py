"""The form of Adam: one kernel on the CPU, the numbers of the plain one, whatever the threads and the checkpoint."""

from __future__ import annotations

import copy

import pytest
import torch
from taxolens.plugin.training.step_choice import fuse_optimizer

Weights = list[torch.nn.Parameter]


def some_weights() -> Weights:
    """As of an SAE; their sizes end inside of a vector of the kernel."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((7, 333), (333, 7), (333,), (7,), (131_073,))
    return [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in sizes]


def steps(weights: Weights, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()


def adam(weights: Weights, *, fused: bool) -> torch.optim.Adam:
    optimizer = torch.optim.Adam(weights, lr=1e-2)
    if fused:
        fuse_optimizer(optimizer)
    return optimizer


def test_one_kernel_gives_the_numbers_of_the_plain_form() -> None:
    plain, fused = some_weights(), some_weights()
    steps(plain, adam(plain, fused=False), range(20))
    optimizer = adam(fused, fused=True)
    steps(fused, optimizer, range(20))
    assert optimizer.param_groups[0]["fused"] is True
    for one, other in zip(plain, fused):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_its_bits_do_not_depend_on_the_threads() -> None:
    found = []
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            weights = some_weights()
            steps(weights, adam(weights, fused=True), range(3))
            found.append(weights)
    finally:
        torch.set_num_threads(threads)
    for weights in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], weights))


@pytest.mark.parametrize("fused", [True, False])
def test_a_checkpoint_of_either_form_goes_on(fused: bool) -> None:
    whole = some_weights()
    steps(whole, adam(whole, fused=True), range(6))
    weights = some_weights()
    first = adam(weights, fused=fused)
    steps(weights, first, range(3))
    saved = copy.deepcopy(first.state_dict())
    second = torch.optim.Adam(weights, lr=1e-2)
    second.load_state_dict(saved)
    fuse_optimizer(second)
    steps(weights, second, range(3, 6))
    for one, other in zip(whole, weights):
        torch.testing.assert_close(one, other, rtol=0 if fused else 1e-5, atol=0 if fused else 1e-6)


def test_elsewhere_torch_chooses() -> None:
    weights = [torch.nn.Parameter(torch.zeros(3, device="meta"))]
    optimizer = adam(weights, fused=True)
    assert optimizer.param_groups[0]["fused"] is None
