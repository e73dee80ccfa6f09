"""Train transformers one block at a time, and use what was trained: dblocks train vit-digits.

`dblocks COMMAND --help` lists a command's options; `dblocks --version` prints the version.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from .. import __version__
from ..offload.memory import parse_bytes, readable
from ..training.progress import stage
from . import commands
from . import export as exporting
from .config import TrainConfig
from .endings import explained, mendable, one_line
from .merge import merge_runs
from .parsing import parse, presets_of
from .plan import plan_of
from .predict import predict as predict_images
from .report import report, show
from .run_folder import new_folder, read_config
from .tasks import task_of

Folder = Annotated[Path, tyro.conf.Positional]
Paths = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(help_behavior_hint="(required)")]
STEMS = {"shared": "shared by all blocks", "per_block": "one per block", "frozen": "trained by none"}
SHOWN = 400  # characters of sampled text that are printed

if TYPE_CHECKING:
    Run = TrainConfig
else:
    Run = None  # the presets as subcommands: `_presets` makes it


def train(config: Annotated[Run, tyro.conf.arg(name="")], overwrite: bool = False) -> None:
    """Train a preset block by block, and the baselines beside it; results and pictures go into the run folder.

    `--config FILE.yaml` takes settings from a run's config.yaml or one like it; options override it.
    `--train-blocks 0 2 --shared per_block --no-adapt` trains these blocks alone; `dblocks merge` joins them.
    For special cases there are also --overlap, --weight-decay, --tune-warmup, --checkpoint-minutes, --log-every,
    --checkpoint-layers, --slots, --moments, --compile, --capture and --no-pin: docs/guides/command.md explains them.

    Args:
        config: The preset and its settings.
        overwrite: Remove the run that the folder already holds.
    """
    if config.out.is_file():
        raise ValueError(f"{config.out} is a file: give --out a folder")
    with explained(config.out):
        report(config, commands.start(config, overwrite=overwrite))


def resume(folder: Folder, lr: float | None = None, steps: int | None = None, clip: float | None = None) -> None:
    """Go on with a run from its last checkpoint, bit for bit.

    Args:
        folder: The run folder.
        lr: A new learning rate, e.g. after a loss that isn't finite.
        steps: A new number of end-to-end steps, for a longer run, or a shorter one.
        clip: A new largest norm of the gradients.
    """
    given = {"lr": lr, "steps": steps, "clip": clip}
    finished = (folder / "summary.json").exists()
    changes = {name: value for name, value in given.items() if value is not None}
    before = read_config(folder)
    for name, value in changes.items():
        print(f"{name}: {getattr(before, name)} before, {value} from here on", file=sys.stderr)
    with explained(folder):
        summary = commands.resume(folder, **changes)
        if finished and not changes:
            print(f"this run was finished; to lengthen it: dblocks resume {folder} --steps NUMBER")
        report(read_config(folder), summary)


def evaluate(folder: Folder, split: Literal["test", "val"] = "test", steps: int | None = None) -> None:
    """Evaluate a run's last checkpoint (accuracy, Fréchet distance or bits per character).

    Args:
        folder: The run folder, or one that `dblocks export` wrote.
        split: Split of the data.
        steps: Steps of the sampling trajectory; the run's own by default.
    """
    at_least_one(steps=steps)
    task, model = commands.open_run(folder)
    task.check_data()
    with stage(f"evaluating on {split}"):
        result = task.evaluate(model, split, steps=steps)
    show(task.metric, result)


def sample(
    folder: Folder,
    out: Path | None = None,
    count: int = 16,
    seed: int = 0,
    steps: int | None = None,
    prompt: str | None = None,
    length: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance: float | None = None,
    sampler: Literal["euler", "heun", "dpmpp_2m"] | None = None,
    label: int | None = None,
    judge: str | None = None,
) -> None:
    """Sample from a run's last checkpoint; also writes the denoising trajectory.

    Args:
        folder: The run folder, or one that `dblocks export` wrote.
        out: Folder to write to, the run folder's samples by default; if it holds files, the next of -2, -3, ...
        count: Number of samples.
        seed: Seed of the noise they start from.
        steps: Steps of the sampling trajectory; the run's own by default.
        prompt: Text to continue; for masked models write \u2591 for each token (by default a character) to fill in.
        length: Tokens to generate, by default characters (masked models: total length including the prompt).
        temperature: Divides the logits of tokens.
        top_k: Keep only the k likeliest tokens.
        top_p: Keep only the likeliest tokens, of this total probability.
        guidance: Classifier-free guidance scale (images only); the run's own by default.
        sampler: Sampler (images only); the run's own by default.
        label: Only images of this class.
        judge: Also write judge.json, which takes the run's data. For text "ngram" (bits under a model of the training
            text), or a GPT-2 or BERT of transformers, by name or folder (MAUVE); for images "inception" (FID and KID).
            It takes thousands of samples: of the 16 by default its numbers mean little, so give --count, too.
    """
    at_least_one(count=count, steps=steps)
    if guidance is not None and not 0 <= guidance < math.inf:
        raise ValueError(f"guidance must be 0 or more, got {guidance}")
    task, model = commands.open_run(folder)
    of_texts = dict(prompt=prompt, length=length, temperature=temperature, top_k=top_k, top_p=top_p)
    of_images = dict(guidance=guidance, sampler=sampler, label=label)
    given = dict(steps=steps, judge=judge, **of_texts, **of_images)
    options = {name: value for name, value in given.items() if value is not None}
    target = new_folder(out or folder / "samples")
    try:
        commands.sample(task, model, target, count=count, seed=seed, **options)
    finally:  # what was written before an error, e.g. of the judge, stays
        for path in sorted(target.iterdir()) if target.exists() else ():
            print(path)
            if path.name == "samples.txt":
                text = path.read_text(encoding="utf-8")
                print(text[:SHOWN] + ("..." if len(text) > SHOWN else ""))


def at_least_one(**numbers: int | None) -> None:
    """Raise ValueError if a number is given that is less than 1."""
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")


def predict(folder: Folder, images: Paths) -> None:
    """Label image files: one JSON object per line with file, label and probability.

    The probability is that of the trajectory's last step; it can be near 1 for a wrong label, too.

    Args:
        folder: The run folder, or one that `dblocks export` wrote.
        images: Files of the size the model was trained on.
    """
    for line in predict_images(*commands.open_run(folder), images):
        print(json.dumps(line))


def plot(folder: Folder) -> None:
    """Draw a finished run's pictures again.

    Args:
        folder: The run folder.
    """
    from .plotting import plots  # Matplotlib takes most of a second

    for path in plots.draw(folder):
        print(path)


def export(folder: Folder, out: Path) -> None:
    """Write a run's trained model as a folder of its own, to keep or to pass on: averaged weights and settings, without
    what only training needs. eval, sample and predict take it as they take the run folder.

    Args:
        folder: The run folder.
        out: Folder to write: safetensors files with an index, as Hugging Face's libraries have them.
    """
    exporting.export(*commands.open_run(folder), out)
    print(out)


def merge(folders: Paths, out: Path) -> None:
    """Join the folders of runs that each trained some of the blocks (`--train-blocks`); no block's file is copied.

    Args:
        folders: The runs' folders, or checkpoints that a Trainer saved.
        out: The folder to write, which must hold nothing.
    """
    rest = f"; evaluate it, and train what is left, by: dblocks resume {out}"
    print(f"{out}{rest if merge_runs(folders, out) else ''}")


def show_plan(
    config: Annotated[Run, tyro.conf.arg(name="")], memory: str | None = None, host_memory: str | None = None
) -> None:
    """Print the bytes a preset will take on its device, by category, for every number of blocks (B).

    The column named like the device is the sum of those before it; behind it stands what waits on the host or on disk.

    Args:
        config: The preset and its settings.
        memory: The device's memory, e.g. 24GiB: also say into how many blocks the network must be cut to fit into it,
            and where the blocks wait while another one trains.
        host_memory: The host's memory, e.g. 16GiB, for blocks that wait there while another one trains on a GPU;
            without it, as much as they take.
    """
    limit, host = (None if text is None else parse_bytes(text) for text in (memory, host_memory))
    plan = plan_of(task_of(config))
    if host is not None and plan.device.type == "cpu":
        raise ValueError("--host-memory: the CPU's memory is the host's: give --memory alone, or --device cuda")
    unit = "in bytes: K, M and G are KiB, MiB and GiB"
    print(f"{config.architecture}, batch {config.batch_size}, stem and head {STEMS[config.shared]}; {unit}\n{plan}")
    if limit is None:
        return
    choice = plan.fit(limit, host)
    within = f"{memory}" if host is None else f"{memory} and {host_memory} of host memory"
    if choice is None:
        least = min(plan.choice(b, offload, 1).usage.total for b in plan.cuts for offload in (None, "disk"))
        print(f"nothing fits in {within}: the least is {readable(least)} on the device")
        sys.exit(1)
    print(f"{within}: {choice}")


def main() -> None:
    """Parse the command line and run the command; an error a user can mend is one line and exit code 2."""
    arguments = sys.argv[1:]
    warnings.formatwarning = one_line
    if arguments == ["--version"]:
        print(f"diffusionblocks {__version__}")
        return
    table: dict[str, Callable[..., Any]] = {
        "train": train,
        "resume": resume,
        "eval": evaluate,
        "sample": sample,
        "predict": predict,
        "plot": plot,
        "export": export,
        "merge": merge,
        "plan": show_plan,
    }
    with mendable():
        presets = presets_of(arguments)
        for command in (train, show_plan):
            command.__annotations__["config"] = Annotated[presets, tyro.conf.arg(name="")]
        parse(table, arguments, __doc__ or "")()
