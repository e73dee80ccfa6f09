"""Training a network that is too large: what each technique takes, in memory and time, beside training in blocks.

python benchmarks/bench_training.py [--device cuda] [--quick] [--out FOLDER] [--only TEXT]; --help names the rest

A DiT and a language model, large ones on a GPU. Plain PyTorch trains all layers at once; each technique is added to
those above it, then others stand alone; then this package, in B blocks. Every row is a process of its own, with peaks
of its own: of device memory, allocated and reserved; of host memory, above what the imports take. Its time is that of
equal work: one step of all layers, or B steps of a block, with its share of the moves between visits of 25 steps. Then
the bandwidth of a move, as a share of a copy's; the peaks against a network's depth; a small block's step against its
kernels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import harness
import torch
from rows import Row, is_ours
from training_rows import Spec, table

ROW = Path(__file__).with_name("training_row.py")
EACH = 60  # seconds that a row may work on a GPU; on a CPU as many times more as it has fewer cores
STARTING = 300  # seconds that it may take to come so far


def measured(spec: Spec, threads: int) -> Row:
    """Run a row's process; a note if it fails or takes too long."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": str(threads)}
    failed = Row(spec.case, "", spec.technique.name)
    try:
        done = subprocess.run(
            [sys.executable, str(ROW), json.dumps(spec.as_dict())], env=env, capture_output=True, text=True,
            timeout=STARTING + 3 * spec.limit,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        failed.note = "hung"
        return failed
    if done.returncode == 0:
        return Row(**json.loads(done.stdout.splitlines()[-1]))
    last = (done.stderr.strip().splitlines() or [""])[-1]
    failed.note = f"over {spec.limit} s" if done.returncode == -14 else f"exit {done.returncode}: {last}"[:200]
    return failed


def main(arguments: list[str] | None = None) -> None:
    """Measure all rows, those first that say most, and write each when it is there."""
    bench = harness.Bench("training", harness.options(__doc__, arguments))
    cuda, quick = bench.device.type == "cuda", bench.options.quick
    limit = 60 if quick else EACH if cuda else 10 * EACH
    # on a GPU the next row's process builds its network while one works on the device
    at_once, lock = (2, tempfile.NamedTemporaryFile(prefix="training")) if cuda else (1, None)
    rows = sorted(table("quick" if quick else bench.device.type.replace("cuda", "gpu")), key=lambda row: row[1].rank)
    specs = [
        Spec(case, technique, network, str(bench.device), quick, lock.name if lock else "", limit)
        for case, technique, network in rows
        if bench.options.only in f"{case}: {technique.name}"
    ]
    with ThreadPoolExecutor(at_once) as pool:
        for row in pool.map(lambda spec: measured(spec, torch.get_num_threads()), specs):
            bench.ours_failed |= is_ours(row.contender) and bool(row.note)
            bench.write(row)
    bench.finish()


if __name__ == "__main__":
    main()
