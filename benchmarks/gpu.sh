#!/usr/bin/env bash
# The tests that need a GPU, then the table of docs/performance.md: at most 8 minutes on one H100.
#
#     benchmarks/gpu.sh [--small]
#
# PYTHON names the interpreter. Without a GPU, or with --small, sizes are small, the tests of GPUs are
# skipped and nothing is stored: it shows that the script works.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}

store=--store
if [[ "${1:-}" == --small ]] || ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    store=--small
fi
timeout 150 "$PYTHON" -m pytest -q -p no:cacheprovider \
    tests/registry/test_pursuit_triton.py tests/registry/test_architectures_contract.py \
    -k "gpu or cuda or triton or kernel"
timeout 330 "$PYTHON" benchmarks/gpu.py $store
