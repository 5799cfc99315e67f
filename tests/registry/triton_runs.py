"""CUDA kernels without a GPU: compiled for devices that are not there, and interpreted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

COMPILE = """
import importlib, json, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton

module, name, arch, types, constants, num_warps = json.loads(sys.argv[1])
kernel = getattr(importlib.import_module(f"taxolens.registry.architectures.parts.{module}"), name)
names = [n for n in kernel.arg_names if n not in constants]
signature = dict(zip(names, types, strict=True)) | dict.fromkeys(constants, "constexpr")
source = ASTSource(kernel, signature, constants)
options = {"num_warps": num_warps}
compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
print(json.dumps({"binary": len(compiled.asm["cubin"]), "ptx": compiled.asm["ptx"][:400]}))
"""


def run(code: str, *arguments: str, **environment: str) -> str:
    """The output of code in a process of its own: Triton reads TRITON_INTERPRET at its import."""
    return started("-c", code, *arguments, **environment)


def started(*arguments: str, **environment: str) -> str:
    """The output of Python in a process of its own."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def assert_compiles(
    module: str, kernel: str, arch: int, types: str, constants: dict[str, Any], num_warps: int
) -> None:
    """Compile a kernel for compute capability `arch`; `types` of its arguments that are no constants."""
    given = json.dumps([module, kernel, arch, types.split(), constants, num_warps])
    found = json.loads(run(COMPILE, given))
    assert found["binary"] > 1000 and f".target sm_{arch}" in found["ptx"]
