"""The CUDA kernel of matching pursuit, without a GPU: compiled for two devices, and interpreted."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from taxolens.registry.architectures.parts import pursuit
from taxolens.registry.architectures.parts.pursuit import Path, _Stop, gram_matrix, pursuit_path
from taxolens.registry.architectures.parts.triton_kernels import TritonKernels
from triton_runs import assert_compiled, compile_all, run

INTERPRET = """
import sys
import torch
from taxolens.registry.architectures.parts import pursuit_triton

given, path = torch.load(sys.argv[1]), sys.argv[1]
k = given["k"]
found = {}
for stop in (False, True):
    indices = torch.zeros(len(given["correlations"]), k, dtype=torch.int64)
    values = torch.zeros(len(given["correlations"]), k)
    assert pursuit_triton.fits(given["gram"])
    pursuit_triton.pursue(given["correlations"], given["gram"], indices, values, stop)
    found[stop] = indices, values
torch.save(found, path)
"""


def test_the_kernel_compiles_for_devices_that_are_not_there() -> None:
    constants, types = {"k": 32, "BLOCK": 16384, "STEPS": 32}, "*fp32 *fp32 *i64 *fp32 i32"
    wanted = [
        ("_pursue", arch, types, {**constants, "STOP": stop}, 16)
        for arch in (80, 90)
        for stop in (False, True)
    ]
    for (_, arch, *_), found in zip(wanted, compile_all("pursuit_triton", wanted), strict=True):
        assert_compiled(found, arch)


def problem() -> tuple[torch.Tensor, torch.Tensor, int]:
    """Inputs, a dictionary with an atom twice, and the number of steps."""
    generator = torch.Generator().manual_seed(0)
    atoms = F.normalize(torch.randn(150, 24, generator=generator), dim=1)
    atoms[120] = atoms[7]
    return torch.randn(12, 24, generator=generator), atoms, 9


def test_interpreted_it_gives_the_path_of_the_torch_loop(tmp_path: Any) -> None:
    x, atoms, k = problem()
    given = {"correlations": x @ atoms.T, "gram": gram_matrix(atoms), "k": k}
    torch.save(given, tmp_path / "given.pt")
    run(INTERPRET, str(tmp_path / "given.pt"), TRITON_INTERPRET="1")
    found = torch.load(tmp_path / "given.pt")
    for stop in (False, True):
        expected = pursuit_path(x, atoms, k, stop_on_duplicate=stop, method="textbook")
        values = found[stop][1]
        assert torch.equal(found[stop][0][values > 0], expected.indices[expected.values > 0])
        torch.testing.assert_close(values, expected.values)
        assert not (found[stop][0] == 120).any()  # the tie goes to the lower index


def tied() -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers, so that ties are exact in any order of summation."""
    atoms = torch.eye(32).repeat_interleave(2, dim=0)
    x = torch.randint(0, 3, (300, 32), generator=torch.Generator().manual_seed(1)).float()
    return x, atoms


@pytest.mark.parametrize("how", [{"method": "textbook"}, {"method": "gram"}, {"compiled": True}])
def test_ties_go_to_the_lowest_index(how: dict[str, Any]) -> None:
    x, atoms = tied()
    path = pursuit_path(x, atoms, 5, **{"method": "gram", **how})
    largest_first = torch.sort(x, dim=1, descending=True, stable=True)
    chosen = largest_first.values[:, :5] > 0
    assert torch.equal(path.indices[chosen], 2 * largest_first.indices[:, :5][chosen])
    assert torch.equal(path.values, largest_first.values[:, :5])


def test_interpreted_ties_go_to_the_lowest_index(tmp_path: Any) -> None:
    x, atoms = (tensor[:8] if tensor.shape[0] == 300 else tensor for tensor in tied())
    given = {"correlations": x @ atoms.T, "gram": gram_matrix(atoms), "k": 5}
    torch.save(given, tmp_path / "given.pt")
    run(INTERPRET, str(tmp_path / "given.pt"), TRITON_INTERPRET="1")
    indices, values = torch.load(tmp_path / "given.pt")[False]
    expected = pursuit_path(x, atoms, 5, method="gram")
    assert torch.equal(indices[values > 0], expected.indices[values > 0])
    assert torch.equal(values, expected.values)


def test_a_kernel_that_fails_is_replaced_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tries: list[int] = []

    def pursue(correlations: Any, gram: Any, indices: Any, values: Any, stop: bool) -> None:
        tries.append(1)
        values.fill_(7.0)  # as one that stops half way
        raise RuntimeError("no compiler for this device")

    kernels = TritonKernels("pursuit_triton", "matching pursuit")
    kernels._imported = SimpleNamespace(fits=lambda gram: True, pursue=pursue)
    monkeypatch.setattr(pursuit, "_kernels", kernels)
    monkeypatch.setattr(kernels, "serve", lambda tensor: kernels.module is not None)
    path = Path(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            stop = _Stop(0.0, False)
            assert not pursuit._by_kernel(torch.zeros(2, 4), torch.eye(4), path, stop)
    assert len(tries) == 1 and not path.values.any()
    assert [r.getMessage() for r in caplog.records] == [
        "the Triton kernels of matching pursuit fail, torch's operations are used: RuntimeError: "
        "no compiler for this device"
    ]


@pytest.mark.parametrize(
    ("is_cuda", "dtype", "served"),
    [
        (True, torch.float32, True),
        (True, torch.bfloat16, True),
        (True, torch.int64, True),
        (True, torch.float64, False),
        (False, torch.float32, False),
    ],
)
def test_kernels_take_what_they_compute_exactly(
    is_cuda: bool, dtype: torch.dtype, served: bool
) -> None:
    kernels = TritonKernels("pursuit_triton", "matching pursuit")
    kernels._imported = SimpleNamespace()
    assert kernels.serve(SimpleNamespace(is_cuda=is_cuda, dtype=dtype)) == served
    kernels.impossible = True
    assert not kernels.serve(SimpleNamespace(is_cuda=is_cuda, dtype=dtype))


def test_a_kernel_runs_on_the_device_of_its_first_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton would take the current one, which is another for each further rank of a machine."""
    calls: list[Any] = []

    @contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        calls.append(tensor)
        yield
        calls.append("left")

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    kernels = TritonKernels("pursuit_triton", "matching pursuit")
    kernels._imported = SimpleNamespace(double=lambda x, y: calls.append("runs") or x + y)
    monkeypatch.setattr(kernels, "serve", lambda tensor: True)
    one = torch.ones(2)
    assert kernels.run("double", one, one).tolist() == [2, 2]
    assert calls[0] is one and calls[1:] == ["runs", "left"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("stop", [False, True])
def test_on_cuda_the_kernel_is_used_and_right(stop: bool) -> None:
    x, atoms, k = problem()
    expected = pursuit_path(x, atoms, k, stop_on_duplicate=stop, method="textbook")
    pursuit._kernels.impossible = False
    found = pursuit_path(x.cuda(), atoms.cuda(), k, stop_on_duplicate=stop, method="gram")
    assert pursuit._kernels.module is not None
    torch.testing.assert_close(found.dense(150).cpu(), expected.dense(150), atol=1e-4, rtol=1e-4)
