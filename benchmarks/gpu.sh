#!/bin/sh
# Stages on the GPU here, by name, in the order given; none stops another, each has a limit in seconds:
#
#   benchmarks/gpu.sh build smoke bench train         # under 8 minutes on 16 slow cores; bench compiles beforehand
#   benchmarks/gpu.sh build tests=300 --shard 1/4     # a quarter of the gpu tests, another limit
#   benchmarks/gpu.sh bench --benches edm_loss        # one op
#   benchmarks/gpu.sh train=1500 deep sanitize        # all rows of trainings; a thousand layers; compute-sanitizer
#   benchmarks/gpu.sh smoke bench train forks --device cpu --quick --tests tests/kernels/test_direct.py
#                                                     # a dry run without a GPU, of a few CPU tests: all don't fit the limit
#
# Results are written as they come to $OUT (default: runs/gpu); a table is printed last. Stages and limits stand in
# gpu_stages.py. $COMMIT names the revision where the code lies outside its repository. JSON of the benches: $OUT/bench.
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH="$PWD:$PWD/python:$PWD/benchmarks:${PYTHONPATH:-}"
exec "${PYTHON:-python3}" benchmarks/gpu_stages.py "$@"
