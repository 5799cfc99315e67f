"""The CUDA kernels of the sparse step: compiled for two devices, and interpreted; on a GPU where there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from far_device import CUDA
from taxolens.registry.architectures.parts import sparse_step
from torch import Tensor
from triton_runs import assert_compiled, compile_all, run, started

INTERPRET = """
import sys
import torch
from taxolens.registry.architectures.parts import sparse_step_triton

calls, path = torch.load(sys.argv[1]), sys.argv[1]
torch.save([getattr(sparse_step_triton, name)(*args) for name, *args in calls], path)
"""
KERNELS = {
    "_pre_activations": ("*{of} *fp32 *fp32 *fp32 i32", {"BLOCK": 4096, "SCALE": True}),
    "_largest_of_rows": (
        "*{of} *{of} *i64 *i32 *i32 i32",
        {"K": 32, "KEPT": 256, "GROUPS": 1024},
    ),
    "_weighted_rows": ("*fp32 *i64 *i64 *{of} *fp32 i32", {"BLOCK": 256, "FIRINGS": 16}),
    "_products_of_rows": ("*{of} *i64 *i64 *{of} *fp32 i32", {"BLOCK": 256, "FIRINGS": 16}),
}
DEVICES = pytest.mark.parametrize("device", ["interpreter", CUDA])


VARIANTS = [
    (kernel, arch, of) for kernel in KERNELS for arch in (80, 90) for of in ("fp32", "bf16")
]


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, int, str], dict[str, Any]]:
    """What the compiler gives for each of `VARIANTS`."""
    wanted = []
    for kernel, arch, of in VARIANTS:
        types, constants = KERNELS[kernel]
        wanted.append((kernel, arch, types.format(of=of), constants, 8))
    return dict(zip(VARIANTS, compile_all("sparse_step_triton", wanted), strict=True))


@pytest.mark.parametrize(("kernel", "arch", "of"), VARIANTS)
def test_the_kernels_compile_for_a_device_that_is_not_there(
    compiled: dict[tuple[str, int, str], dict[str, Any]], kernel: str, arch: int, of: str
) -> None:
    assert_compiled(compiled[kernel, arch, of], arch)


def results(calls: list[tuple[Any, ...]], device: str, folder: Path) -> list[Any]:
    """What the functions of the module return for their arguments."""
    if device == "interpreter":
        torch.save(calls, folder / "calls.pt")
        run(INTERPRET, str(folder / "calls.pt"), TRITON_INTERPRET="1")
        return torch.load(folder / "calls.pt")
    there = [[a.cuda() if isinstance(a, Tensor) else a for a in call] for call in calls]
    found = [sparse_step.kernels.run(*call) for call in there]
    assert sparse_step.kernels.module is not None
    return [tuple(x.cpu() for x in f) if isinstance(f, tuple) else f.cpu() for f in found]


def rows() -> dict[str, tuple[Tensor, int]]:
    """Pre-activations and k: usual ones, and rows that the bound of the groups does not serve."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    in_one_group = drawn(2, 5000)
    in_one_group[:, ::1024] += 9
    return {
        "usual": (drawn(3, 2500), 32),
        "half precision": (drawn(3, 2500).bfloat16(), 32),
        "narrow": (drawn(3, 50), 5),
        "every latent": (drawn(2, 40), 40),
        "few above 0": (drawn(3, 2500) - 2.9, 32),
        "none above 0": (-drawn(2, 2500).abs(), 7),
        "all equal": (torch.ones(2, 2500), 7),
        "many ties": (drawn(3, 2500).mul(2).round(), 20),
        "in one group": (in_one_group, 5),
        "infinite": (torch.where(drawn(2, 2500) > 2, torch.inf, drawn(2, 2500)), 80),
    }


@DEVICES
def test_the_largest_of_each_row_are_selected(device: str, tmp_path: Path) -> None:
    """Exactly, and of equal ones the first."""
    problems = rows()
    calls = [("largest_of_rows", pre, k) for pre, k in problems.values()]
    for (name, (pre, k)), (values, columns) in zip(
        problems.items(), results(calls, device, tmp_path), strict=True
    ):
        wanted = pre.relu().float().sort(dim=1, descending=True, stable=True)
        assert torch.equal(columns.sort().values, wanted.indices[:, :k].sort().values), name
        assert torch.equal(pre.relu().gather(1, columns), values), name


@DEVICES
def test_pre_activations_are_rounded_as_by_torch(device: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    product, bias = (torch.randn(shape, generator=generator) for shape in ((3, 5000), (5000,)))
    norms = torch.rand(5000, generator=generator)
    half = torch.bfloat16
    cases = [
        (product, bias, norms),
        (product, bias, None),
        (product.to(half), bias, norms),
        (product.to(half), bias.to(half), norms.to(half)),
    ]
    calls = [("pre_activations", *case) for case in cases]
    for (x, b, n), found in zip(cases, results(calls, device, tmp_path), strict=True):
        wanted = x + b if n is None else (x + b) * n
        assert found.dtype == wanted.dtype
        if device == "interpreter" and found.dtype == half:  # which cuts bits off
            torch.testing.assert_close(found, wanted, rtol=0.02, atol=0)
        else:
            assert torch.equal(found, wanted)


@DEVICES
def test_not_a_number_is_selected(device: str, tmp_path: Path) -> None:
    pre = torch.rand(2, 3000)
    pre[0, 2100], pre[1, 7] = torch.nan, -torch.nan
    ((values, columns),) = results([("largest_of_rows", pre, 3)], device, tmp_path)
    assert [2100 in columns[0], 7 in columns[1]] == [True, True]
    assert values.isnan().sum(1).tolist() == [1, 1]


@DEVICES
@pytest.mark.parametrize("d", [1, 70, 600])
def test_rows_are_weighed_and_multiplied(device: str, d: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(d)
    n, m, counts = 6, 30, torch.tensor([3, 0, 40, 16, 1, 20])
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    columns = torch.randint(0, m, (int(counts.sum()),), generator=generator)
    values = torch.randn(len(columns), generator=generator) * (columns != 4)
    table = torch.randn(m, d, generator=generator)
    left = torch.randn(n, d, generator=generator)
    calls = [
        ("weighted_rows", values, columns, offsets, table, torch.float32),
        ("weighted_rows", values, columns, offsets, table.bfloat16(), torch.bfloat16),
        ("products_of_rows", left, offsets, columns, table),
    ]
    sums, halves, products = results(calls, device, tmp_path)
    of = torch.arange(n).repeat_interleave(counts)
    wanted = torch.zeros(n, d, dtype=torch.float64)
    wanted.index_add_(0, of, values[:, None].double() * table[columns])
    torch.testing.assert_close(sums.double(), wanted, rtol=1e-5, atol=1e-5)
    assert halves.dtype == torch.bfloat16
    torch.testing.assert_close(halves.double(), wanted, rtol=0.05, atol=0.1)
    torch.testing.assert_close(products, (left[of] * table[columns]).sum(1), rtol=1e-4, atol=1e-4)


def test_a_step_by_interpreted_kernels_has_the_loss_and_gradients_of_the_dense_one() -> None:
    """The tests of the sparse step, with rescaling and many dead latents, and with neither."""
    file = Path(__file__).with_name("test_sparse_step.py")
    which = "loss_and_gradients and cpu and (True-60-True or False-0-False)"
    options = ("-p", "no:cacheprovider", "-p", "interpreted_kernels", "-k", which)
    out = started("-m", "pytest", str(file), *options, TRITON_INTERPRET="1")
    assert "10 passed" in out
