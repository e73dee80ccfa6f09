"""Ranks of a mesh: `python mesh_worker.py FOLDER SCENARIO GROUPS RANKS` forks them, or is one of torchrun's."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import diffusionblocks as db
import small

STEPS = 12
SETTINGS = {"shared": {"shared": "shared", "accumulate": 2, "kind": "images"}}


def trainer(folder: Path, **settings) -> db.Trainer:
    """Return a trainer without dropout, whose draws are by rows of their own."""
    settings = {"shared": "per_block", "kind": "labels", "seed": 0, **settings}
    shared, kind = settings.pop("shared"), settings.pop("kind")
    model = small.model(kind, blocks=3, layers=3, shared=shared, seed=settings["seed"])
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    defaults = dict(lr=1e-2, steps=24, visit=2, ema=0.9, adapt=False, device="cpu", offload="disk")
    return db.Trainer(model, **(defaults | {"folder": folder / "waiting"} | settings))


class Bytes(TorchDispatchMode):
    """Counts the bytes that are given to collectives, by process group."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            group = next(
                dist.ProcessGroup.unbox(a)
                for a in args
                if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type())
            )
            tensors = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            flat = [t for item in tensors for t in (item if isinstance(item, (list, tuple)) else [item])]
            self.counts[group.group_name] += sum(t.nbytes for t in flat)
        return func(*args, **(kwargs or {}))


def connections() -> list[list[int]]:
    """Return this process's established TCP connections: local and remote port."""
    inodes = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            inodes.add(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            continue
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            _, local, remote, state, *rest = line.split()
            if state == "01" and f"socket:[{rest[5]}]" in inodes:
                found.append([int(address.rpartition(":")[2], 16) for address in (local, remote)])
    return found


def run(folder: Path, scenario: str, groups: int, ranks: int) -> None:
    """Be one rank: train, save, and write what was seen."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    seen, norms = {"blocks": None, "error": None}, []
    try:
        with Bytes() as bytes_:
            made = trainer(
                folder, mesh=(groups, ranks), seed=rank if scenario == "seeds" else 0, **SETTINGS.get(scenario, {})
            )
            kind = SETTINGS.get(scenario, {}).get("kind", "labels")
            seen |= {"blocks": sorted(made.own), "start": sum(bytes_.counts.values())}
            for step in range(STEPS):
                if scenario == "death" and rank == groups * ranks - 1 and step == 5:
                    os._exit(9)
                if step == STEPS // 2:  # while all ranks of the group are there
                    seen["connections"] = connections()
                norms.append(made.step(*small.batch(kind, step, 8 if scenario != "uneven" else 9)).grad_norm)
        made.save(folder / "checkpoint", extra={"rank": rank})
        seen |= {
            "steps": made.steps_done,
            "norms": [float(norm) for norm in norms if norm is not None and not norm.isnan()],
            "bytes": dict(bytes_.counts),
        }
        seen["groups"] = [len(g) for g in dist.distributed_c10d._world.pg_group_ranks.values()]
        trained = [p for b in made.own for p in made.model.blocks[b].parameters() if p.requires_grad]
        seen["per_round"] = sum(p.nbytes + 4 for p in trained)  # each with the number of ranks that reached it
        parts = made.model.parts()
        buffers = [len([*parts["shared"].buffers(), *parts[f"block_{b}"].buffers()]) for b in made.own]
        seen["buffers"] = sum(buffers) * 8 * ranks
        torch.save(small.everything(made), folder / f"rank{rank}.pt")
    except Exception as error:
        seen["error"] = f"{type(error).__name__}: {error}"
    (folder / f"rank{rank}.json").write_text(json.dumps(seen))


def main() -> None:
    folder, scenario, groups, ranks = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    if "RANK" in os.environ:
        run(folder, scenario, groups, ranks)
        return
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    world = groups * ranks
    children = []
    for rank in range(world):
        if (pid := os.fork()) == 0:
            place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, MASTER_ADDR="localhost", MASTER_PORT=port)
            os.environ.update({name: str(value) for name, value in place.items()})
            run(folder, scenario, groups, ranks)
            sys.exit(0)
        children.append(pid)
    print(json.dumps({"port": port, "codes": [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]}))


if __name__ == "__main__":
    main()
