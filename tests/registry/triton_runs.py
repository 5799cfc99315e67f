"""CUDA kernels without a GPU: compiled for devices that are not there, and interpreted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

COMPILE = """
import importlib, json, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton

def compiled(name, arch, types, constants, num_warps):
    kernel = getattr(module, name)
    names = [n for n in kernel.arg_names if n not in constants]
    signature = dict(zip(names, types.split(), strict=True)) | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constants)
    options = {"num_warps": num_warps}
    asm = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm
    return {"binary": len(asm["cubin"]), "ptx": asm["ptx"][:400]}

module, kernels = json.loads(sys.argv[1])
module = importlib.import_module(f"taxolens.registry.architectures.parts.{module}")
found = []
for kernel in kernels:
    try:
        found.append(compiled(*kernel))
    except Exception as error:
        found.append({"error": f"{type(error).__name__}: {error}"})
print(json.dumps(found))
"""
Kernel = tuple[str, int, str, dict[str, Any], int]
"""Name, compute capability, types of the arguments that are no constants, constants, warps."""


def run(code: str, *arguments: str, **environment: str) -> str:
    """The output of code in a process of its own: Triton reads TRITON_INTERPRET at its import."""
    return started("-c", code, *arguments, **environment)


def started(*arguments: str, **environment: str) -> str:
    """The output of Python in a process of its own, which finds the modules of this folder."""
    pytest.importorskip("triton")
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(paths), **environment}
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def compile_all(module: str, kernels: Sequence[Kernel]) -> list[dict[str, Any]]:
    """What the compiler gives for each kernel of a module, all in one process of its own."""
    return json.loads(run(COMPILE, json.dumps([module, kernels])))


def assert_compiled(found: dict[str, Any], arch: int) -> None:
    """A result of `compile_all` is a program for compute capability `arch`."""
    assert "error" not in found, found
    assert found["binary"] > 1000 and f".target sm_{arch}" in found["ptx"]
