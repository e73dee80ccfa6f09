"""Several processes: groups of ranks that share a block's batches, and nothing between groups."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

import diffusionblocks as db
import mesh_worker
import small
import warm
from diffusionblocks.checkpoint.files import CheckpointError
from diffusionblocks.training.mesh import Mesh

TESTS = Path(mesh_worker.__file__).parent
# Gradients are sums over half a batch each, added in another order than one sum over all: float32 rounding, 6e-8 of
# each, which AdamW's division by the moments' root can make some hundred times larger where a gradient is near zero.
CLOSE = dict(rtol=1e-3, atol=1e-4)


def ranks(folder, scenario, groups, per_group, *, torchrun=False):
    """Run a mesh's processes; return what each has seen, None for one that died, and the store's port."""
    command = [TESTS / "mesh_worker.py", folder, scenario, str(groups), str(per_group)]
    if torchrun:
        command[:0] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(groups * per_group)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), "OMP_NUM_THREADS": "1"}
    done = warm.run(*command, env=environment, imports=warm.TRAINING)
    assert done.returncode == 0, done.stderr
    files = [folder / f"rank{rank}.json" for rank in range(groups * per_group)]
    seen = [json.loads(file.read_text()) if file.exists() else None for file in files]
    return seen, None if torchrun else json.loads(done.stdout.splitlines()[-1])["port"]


def single(folder, steps, **settings):
    made = mesh_worker.trainer(folder, **settings)
    for step in range(steps):
        made.step(*small.batch(settings.get("kind", "labels"), step))
    return made


def assert_close(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        torch.testing.assert_close(found[name], t, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mesh")
    return folder, *ranks(folder, "train", 2, 2)


def test_each_group_trains_its_blocks(mesh):
    _, seen, _ = mesh
    assert [rank["error"] for rank in seen] == [None] * 4
    assert [rank["blocks"] for rank in seen] == [[0, 2], [0, 2], [1], [1]]
    assert [rank["steps"] for rank in seen] == [mesh_worker.STEPS] * 4


def test_no_byte_passes_between_blocks(mesh):
    """Every process belongs to one process group, of its own group's two ranks, and holds no other connection but to
    the store that they met at; within it the gradients pass once a step, and checksums at the start, and of buffers in
    each block's first step."""
    _, seen, port = mesh
    visits = mesh_worker.STEPS // 3  # steps of each block
    for rank in seen:
        assert rank["groups"] == [2] and len(rank["bytes"]) == 1
        assert sum(rank["bytes"].values()) - rank["start"] == rank["per_round"] * visits + rank["buffers"] > 0
    for a, one in enumerate(seen):
        for b, other in enumerate(seen):
            met = {tuple(pair) for pair in one["connections"]} & {tuple(pair[::-1]) for pair in other["connections"]}
            between = [pair for pair in met if port not in pair]
            if a // 2 != b // 2:
                assert not between, f"ranks {a} and {b}, of different blocks, are connected"
            elif a != b:
                assert between


def test_the_ranks_of_a_group_stay_equal(mesh):
    folder, seen, _ = mesh
    for first, second in ((0, 1), (2, 3)):
        one, other = (torch.load(folder / f"rank{r}.pt", weights_only=True) for r in (first, second))
        own = [name for name in one if any(name.startswith(f"block_{b}/") for b in seen[first]["blocks"])]
        assert own and all(torch.equal(one[name], other[name]) for name in own)


def test_it_is_one_process_with_the_whole_batch_up_to_rounding(mesh, tmp_path):
    folder, seen, _ = mesh
    trained = mesh_worker.trainer(tmp_path / "one")
    steps = [trained.step(*small.batch(step=step)) for step in range(mesh_worker.STEPS)]
    for rank in seen:  # AdamW would hide gradients that are all half or twice as large
        norms = [float(out.grad_norm) for out in steps if out.block in rank["blocks"]]
        assert rank["norms"] == pytest.approx(norms, rel=1e-3)
    one = small.everything(trained)
    back = mesh_worker.trainer(tmp_path / "back")
    assert back.load(folder / "checkpoint") == {"rank": 0}
    found = small.everything(back)
    assert_close(found, one, **CLOSE)
    start = small.everything(mesh_worker.trainer(tmp_path / "start"))
    moved = [n for n, t in start.items() if n.startswith("block_") and "weight/" in n and not torch.equal(found[n], t)]
    assert len(moved) > 6, "it has trained"


def test_one_process_goes_on_from_four(mesh, tmp_path):
    folder, _, _ = mesh
    back = mesh_worker.trainer(tmp_path / "back")
    back.load(folder / "checkpoint")
    for step in range(mesh_worker.STEPS, 18):
        back.step(*small.batch(step=step))
    assert_close(small.everything(back), small.everything(single(tmp_path / "one", 18)), **CLOSE)
    back.save(tmp_path / "next")
    with pytest.raises(CheckpointError, match="holds checkpoints of groups: save to another folder"):
        back.save(folder / "checkpoint")


def test_groups_merge(mesh, tmp_path):
    folder, _, _ = mesh
    groups = sorted((folder / "checkpoint").iterdir())
    assert [group.name for group in groups] == ["group_0", "group_1"]
    db.merge(groups, tmp_path / "whole", extra={})
    back = mesh_worker.trainer(tmp_path / "back")
    back.load(tmp_path / "whole")
    part = mesh_worker.trainer(tmp_path / "part", train_blocks=(1,))
    part.load(folder / "checkpoint")  # its own group's alone
    assert part.saved[0].name == "group_1"


def test_a_rank_that_dies_is_named_and_other_groups_go_on(tmp_path):
    seen, _ = ranks(tmp_path, "death", 2, 2)
    assert seen[3] is None
    assert "RankLost: rank 3 of group 1 (ranks 2 to 3) died or stopped; other groups go on" in seen[2]["error"]
    assert [rank["steps"] for rank in seen[:2]] == [mesh_worker.STEPS] * 2
    assert [group.name for group in (tmp_path / "checkpoint").iterdir()] == ["group_0"]
    with pytest.raises(CheckpointError, match="none has block_1"):
        mesh_worker.trainer(tmp_path / "back").load(tmp_path / "checkpoint")


@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        ("uneven", "a batch of 9 can't be shared by 2 ranks"),
        ("seeds", "begin with different weights of block_0, .*seed"),
    ],
)
def test_bad_input_is_refused_on_every_rank(tmp_path, scenario, message):
    for rank in ranks(tmp_path, scenario, 1, 2)[0]:
        with pytest.raises(ValueError, match=message):
            raise ValueError(rank["error"])


def test_one_group_is_data_parallel_training_of_what_blocks_share(tmp_path):
    seen, _ = ranks(tmp_path, "shared", 1, 2)
    assert [rank["error"] for rank in seen] == [None] * 2
    settings = mesh_worker.SETTINGS["shared"]
    back = mesh_worker.trainer(tmp_path / "back", **settings)
    back.load(tmp_path / "checkpoint")
    assert_close(
        small.everything(back), small.everything(single(tmp_path / "one", mesh_worker.STEPS, **settings)), **CLOSE
    )


@pytest.mark.slow
def test_by_torchrun(tmp_path):
    seen, _ = ranks(tmp_path, "train", 1, 2, torchrun=True)
    assert [rank["error"] for rank in seen] == [None] * 2
    back = mesh_worker.trainer(tmp_path / "back")
    back.load(tmp_path / "checkpoint")
    assert_close(small.everything(back), small.everything(single(tmp_path / "one", mesh_worker.STEPS)), **CLOSE)


def test_a_mesh_without_its_processes_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="needs 4 processes, and there are 1: start them by torchrun --nproc-per-node 4"
    ):
        mesh_worker.trainer(tmp_path, mesh=(2, 2))
    with pytest.raises(ValueError, match="mesh must be a tuple of 2"):
        mesh_worker.trainer(tmp_path, mesh=(2,))


@pytest.mark.parametrize("kind", small.KINDS)
def test_rows_of_a_batch_have_the_noise_that_they_have_in_the_whole(kind):
    model = small.model(kind).eval()
    x, y = small.batch(kind)
    sigma = model.draw_sigma(1, model.target.level_shape(y), seed=0, step=3, device=model.device)
    whole = model.loss_at(1, x, y, sigma, seed=0, step=3)
    halves = [model.loss_at(1, x, y, sigma, seed=0, step=3, weight=0.5, rows=Mesh(1, 2, 0, r).rows(8)) for r in (0, 1)]
    torch.testing.assert_close(halves[0].loss + halves[1].loss, whole.loss)
