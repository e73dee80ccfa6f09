#!/bin/sh
# All GPU tests, then all benchmarks, on the GPU here. JSON goes to the folder given, else to $OUT, else beside the others.
#   benchmarks/gpu.sh [FOLDER]
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${1:-${OUT:-}}
[ -n "$OUT" ] && mkdir -p "$OUT" && set -- --out "$OUT" || set --
export PYTHONPATH="$PWD:$PWD/python:${PYTHONPATH:-}"

FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0a} $PYTHON setup.py build_ext --inplace || exit 1
$PYTHON -m dbkernels
$PYTHON -m pytest tests -m gpu -q || exit 1
failed=0
for bench in benchmarks/bench_*.py; do
  echo "== $bench"
  $PYTHON "$bench" --device cuda --seconds 0.2 "$@" || failed=1
done
exit $failed
