"""A save that is killed, fails or loses power at any instant leaves the old checkpoint or the new one, whole.

The kills happen in a process of their own (this file, run as a script: FOLDER COUNT SEED), which forks its victims:
they inherit an imported torch, so that a kill costs milliseconds, and no thread of pytest is forked along.
"""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusionblocks.checkpoint import atomic
from diffusionblocks.checkpoint import files as checkpoint
from diffusionblocks.checkpoint.shards import load_shards, read_index, save_shards

BLOCKS, NUMBERS = ("block_0", "block_1"), 50_000  # 200 kB a part, so that writing one takes a moment too


def save(folder: Path, n: int) -> None:
    """The n-th save: shared and one block are new and full of n, the other block is kept."""
    written = dict.fromkeys(("shared", *BLOCKS), n)
    keep = [BLOCKS[n % 2]] if n > 0 else []
    written |= dict.fromkeys(keep, n - 1)
    parts = {name: {"w": torch.full((NUMBERS,), float(n))} for name in written if name not in keep}
    checkpoint.save(folder, parts, {"n": n, "written": written}, keep=keep)


def check(folder: Path) -> int:
    """Assert that the folder holds one whole save; its number."""
    manifest = checkpoint.read_state(folder)
    assert manifest.saves == manifest.state["n"] + 1
    for name, n in manifest.state["written"].items():
        w = checkpoint.load_part(folder, name, manifest=manifest)["w"]
        assert w.shape == (NUMBERS,) and bool((w == n).all()), (name, n, w)
    return int(manifest.state["n"])


def save_model(folder: Path, n: int) -> None:
    """Save a model folder, the n-th time, full of n."""
    save_shards(
        folder, {name: {f"{name}.w": torch.full((NUMBERS,), float(n))} for name in ("shared", *BLOCKS)}, {"n": n}
    )


def check_model(folder: Path) -> int:
    """Assert that the folder holds one whole model, and return its number."""
    n = int(read_index(folder)[0]["n"])
    tensors = dict(load_shards(folder))
    assert tensors.keys() == {"shared", *BLOCKS}
    assert all(bool((x == n).all()) for part in tensors.values() for x in part.values())
    return n


def part_files(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if ".safetensors" in path.name and ".json" not in path.name]


def moments() -> Iterator[tuple[int, str]]:
    return ((index, when) for index in itertools.count() for when in ("before", "within", "after"))


def at_every_touch(setattr: Callable[[Any, str, Any], None], act: Callable[[int, str, str], None]) -> None:
    """Have act(index, when, call) called around each change that a save makes to the disk: "before" and "after" it, and
    "within" a write, whose first half is on the disk then."""
    count = itertools.count()

    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        def function(*args: Any, **kwargs: Any) -> Any:
            index, name = next(count), real.__name__
            call = " ".join([name, *(os.path.basename(arg) for arg in args if isinstance(arg, (str, Path)))])
            act(index, "before", call)
            done = 0
            if name == "write":
                file, data = args
                done = real(file, memoryview(data)[: len(data) // 2])
                args = file, memoryview(data)[done:]
            act(index, "within", call)
            result = real(*args, **kwargs)
            act(index, "after", call)
            return result + done if name == "write" else result

        return function

    class File(io.FileIO):
        write = watched(io.FileIO.write)

    def watched_open(path: Path, mode: str) -> Any:
        return io.BufferedWriter(File(path, mode)) if "w" in mode else open(path, mode)

    setattr(atomic, "open", watched_open)
    for owner, name in ((os, "fsync"), (os, "replace"), (Path, "unlink")):
        setattr(owner, name, watched(getattr(owner, name)))


# Kills (in the process of their own)


def die_in(work: Callable[[], None], after: float | None = None) -> bool:
    """Run `work` in a fork, to be killed `after` seconds or to kill itself; whether it was killed."""
    worker = os.fork()
    if worker == 0:
        try:
            work()
        finally:
            os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(worker, signal.SIGKILL)
    _, status = os.waitpid(worker, 0)
    return os.WIFSIGNALED(status)


def kills_at_random(folder: Path, count: int, seed: int) -> dict[str, int]:
    """Kill a saving loop at random times. No save that had returned may be lost, none may be half there."""
    chance, saved, interrupted = random.Random(seed), 1, 0
    save(folder, 0)
    start_time = time.perf_counter()
    save(folder, 1)
    longest = 4 * min(max(time.perf_counter() - start_time, 0.02), 0.3)  # some saves, on a slow disk too
    for _ in range(count):
        start = saved + 1
        reader, writer = os.pipe()

        def loop(start: int = start, writer: int = writer) -> None:
            for n in range(start, start + 10_000):
                save(folder, n)
                os.write(writer, b".")

        assert die_in(loop, after=chance.uniform(0.0, longest))
        os.close(writer)
        with os.fdopen(reader, "rb") as acknowledged:
            returned = saved + len(acknowledged.read())
        saved = check(folder)
        assert saved in (returned, returned + 1), (saved, returned)
        # The three that are named, and at most two that the save was adding or was yet to remove.
        assert len(part_files(folder)) <= 5, part_files(folder)
        interrupted += len(list(folder.iterdir())) > 4
    return {"saves": saved, "interrupted": interrupted}


def kills_at_every_touch(
    folder: Path, save: Callable[[Path, int], None], check: Callable[[Path], int]
) -> dict[str, int]:
    """Kill one save at each of its touches of the disk in turn, until a save gets through unharmed."""
    save(folder, 0)
    saved, outcomes = 0, {"old": 0, "new": 0}
    for moment in moments():

        def work(moment: tuple[int, str] = moment, n: int = saved + 1) -> None:
            def die(index: int, when: str, call: str) -> None:
                if (index, when) == moment:
                    os.kill(os.getpid(), signal.SIGKILL)

            at_every_touch(setattr, die)
            save(folder, n)

        killed = die_in(work)
        now = check(folder)
        if not killed:
            assert now == saved + 1 and len(part_files(folder)) == 3
            break
        assert now in (saved, saved + 1)
        outcomes["new" if now > saved else "old"] += 1
        saved = now
    return outcomes


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("kills")
    import warm  # which the script has no path to

    done = warm.run(__file__, root, "40", "0")
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_forty_kills_at_random_times_lose_nothing(report: dict[str, Any]) -> None:
    assert report["random"]["saves"] > 1
    assert report["random"]["interrupted"] >= 5  # else the kills missed the saves, and showed nothing


def test_a_kill_at_every_touch_of_the_disk_loses_nothing(report: dict[str, Any]) -> None:
    assert report["touches"]["old"] >= 20 and report["touches"]["new"] >= 5
    assert report["models"]["old"] >= 20 and report["models"]["new"] >= 5


# Failures and orders (in pytest's process)


@pytest.mark.parametrize(
    ("code", "save", "check"),
    [(code, save, check) for code in (errno.EIO, errno.ENOSPC, errno.EDQUOT)]
    + [(errno.EROFS, save_model, check_model)],
)
@pytest.mark.filterwarnings("ignore:.*differs from the config")  # between the two renames of a commit
def test_an_error_at_every_touch_of_the_disk_leaves_one_whole_save(
    tmp_path: Path, code: int, save: Callable[[Path, int], None], check: Callable[[Path], int]
) -> None:
    save(tmp_path, 0)
    saved, failures = 0, 0
    for moment in moments():

        def fail(index: int, when: str, call: str, moment: tuple[int, str] = moment) -> None:
            if (index, when) == moment:
                raise OSError(code, f"{os.strerror(code)}, says the test, {when} {call}")

        with pytest.MonkeyPatch.context() as patch:
            at_every_touch(lambda owner, name, value: patch.setattr(owner, name, value, raising=False), fail)
            try:
                save(tmp_path, saved + 1)
            except OSError as error:
                failures, words = failures + 1, str(error)
            else:
                break
        now = check(tmp_path)
        assert ("the save itself is complete" in words) == (now == saved + 1), words
        assert now in (saved, saved + 1)
        assert len(part_files(tmp_path)) <= 6
        saved = now
    assert failures >= 25
    assert len(part_files(tmp_path)) == 3


def test_nothing_is_named_before_it_is_synced_nor_removed_before_the_manifest_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut needs and a kill can't show: a kill loses nothing that was written, synced or not."""
    save(tmp_path, 0)
    calls: list[str] = []

    def note(index: int, when: str, call: str) -> None:
        if when == "before":
            calls.append(call)

    at_every_touch(lambda owner, name, value: monkeypatch.setattr(owner, name, value, raising=False), note)
    save(tmp_path, 1)
    kinds = [call for call, _ in itertools.groupby(call.split()[0] for call in calls)]
    committed = next(i for i, call in enumerate(calls) if call.endswith(" manifest.json"))
    renames = [i for i, call in enumerate(calls) if call.startswith("replace")]
    assert kinds == ["write", "fsync", "replace", "fsync"] * 3 + ["unlink"]  # two parts and the manifest
    assert renames[-1] == committed  # the manifest comes last,
    assert [i for i, call in enumerate(calls) if "unlink" in call] == [len(calls) - 2, len(calls) - 1]
    assert calls[committed + 1 : -2] == ["fsync", "fsync"]  # and is durable before the first removal


def test_the_disk_never_holds_more_than_the_old_and_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 0)
    (tmp_path / "shared.save2.safetensors.tmp").write_bytes(bytes(8 * NUMBERS))  # a dead save's
    most = 0

    def measure(index: int, when: str, call: str) -> None:
        nonlocal most
        if not call.startswith("unlink") and index > 3:  # once the dead save's file is gone
            most = max(most, sum(path.stat().st_size for path in tmp_path.iterdir()))

    at_every_touch(lambda owner, name, value: monkeypatch.setattr(owner, name, value, raising=False), measure)
    save(tmp_path, 1)
    assert 5 * 4 * NUMBERS < most < 5 * 4 * NUMBERS + 5_000  # three old parts, two new ones, and headers


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    at_random = kills_at_random(root / "random", count=int(sys.argv[2]), seed=int(sys.argv[3]))
    at_touches = kills_at_every_touch(root / "touches", save, check)
    in_models = kills_at_every_touch(root / "models", save_model, check_model)
    print(json.dumps({"random": at_random, "touches": at_touches, "models": in_models}))
