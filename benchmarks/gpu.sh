#!/usr/bin/env bash
# The tests of CUDA (TEST_SECONDS, 100), then the table of docs/performance.md (TABLE_SECONDS, 200), on one H100.
#
#     benchmarks/gpu.sh [--small] [PARTS of gpu.py ...]
#
# PYTHON names the interpreter. Without a GPU, or with --small, sizes are small, the tests of GPUs are
# skipped and nothing is stored: it shows that the script works. Failures and rows are printed as they come.
# The table is printed even where a test fails; the exit status is then that of the tests.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}

store=--store
if [[ "${1:-}" == --small ]]; then
    store=--small
    shift
elif ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    store=--small
fi
cores=$(nproc)
parallel=
if "$PYTHON" -c 'import xdist' 2> /dev/null; then
    parallel="-n $((cores < 12 ? cores : 12))"
fi
status=0
# -k: whatever has the parameter "cuda", or the word in its name.
OMP_NUM_THREADS=1 PYTHONPATH="benchmarks${PYTHONPATH:+:$PYTHONPATH}" timeout --kill-after 5 "${TEST_SECONDS:-100}" \
    "$PYTHON" -m pytest -p no:cacheprovider -p failures_as_they_come --tb=short --no-summary \
    $parallel -k cuda \
    tests/hooks/test_activations.py tests/hooks/test_cache.py tests/hooks/test_families_contract.py \
    tests/plugin/test_device.py tests/plugin/test_resume.py tests/plugin/test_runner.py \
    tests/registry/test_architectures_contract.py tests/registry/test_device.py tests/registry/test_parts.py \
    tests/registry/test_pursuit_triton.py tests/registry/test_sparse_step.py \
    tests/registry/test_sparse_step_triton.py || status=$?
timeout --kill-after 5 "${TABLE_SECONDS:-200}" "$PYTHON" benchmarks/gpu.py $store ${@:+--parts "$@"} || status=$((status ? status : $?))
exit "$status"
