#!/usr/bin/env bash
# The tests that need a GPU, then the table of docs/performance.md: at most 8 minutes on one H100.
#
#     benchmarks/gpu.sh [--small]
#
# PYTHON names the interpreter. Without a GPU, or with --small, sizes are small, the tests of GPUs are
# skipped and nothing is stored: it shows that the script works. The table is printed even where a test
# fails; the exit status is then that of the tests.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}

store=--store
if [[ "${1:-}" == --small ]] || ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    store=--small
fi
cores=$(nproc)
parallel=
if "$PYTHON" -c 'import xdist' 2> /dev/null; then
    parallel="-n $((cores < 8 ? cores : 8))"
fi
status=0
# -k: whatever has the parameter "cuda", and the Triton kernel's tests.
OMP_NUM_THREADS=1 timeout --signal INT --kill-after 10 150 \
    "$PYTHON" -m pytest -q -p no:cacheprovider $parallel -k "cuda or triton" \
    tests/hooks/test_cache.py tests/hooks/test_families_contract.py \
    tests/plugin/test_device.py tests/plugin/test_resume.py tests/plugin/test_runner.py \
    tests/registry/test_architectures_contract.py tests/registry/test_device.py \
    tests/registry/test_pursuit_triton.py tests/registry/test_sparse_step.py || status=$?
timeout 330 "$PYTHON" benchmarks/gpu.py $store
exit "$status"
