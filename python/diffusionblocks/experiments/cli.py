"""The `dblocks` command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from ..training.memory import CATEGORIES, parse_bytes, readable
from . import commands as jobs
from . import export as exporting
from .config import TrainConfig
from .plan import plans, smallest_fit
from .plotting import plots
from .predict import predict as predict_images
from .presets import RUNS
from .session import NonFiniteLoss
from .tasks import adapter_of
from .tasks.base import Metric

if TYPE_CHECKING:
    Run = TrainConfig
else:
    Run = tyro.extras.subcommand_type_from_defaults(
        {name: config for name, (_, config) in RUNS.items()},
        {name: text for name, (text, _) in RUNS.items()},
        prefix_names=False,
    )
FLAGS = (tyro.conf.OmitSubcommandPrefixes, tyro.conf.CascadeSubcommandArgs)
Folder = Annotated[Path, tyro.conf.Positional]
console = Console()


def train(config: Annotated[Run, tyro.conf.arg(name="")]) -> None:
    """Train block by block, and the baselines beside it; results and pictures go into the run folder.

    Args:
        config: the run.
    """
    report(config, jobs.start(config))


def resume(folder: Folder) -> None:
    """Go on with a run from its last checkpoint, bit for bit.

    Args:
        folder: the run folder.
    """
    report(jobs.read_config(folder), jobs.resume(folder))


def evaluate(folder: Folder, split: Literal["test", "val"] = "test", steps: int | None = None) -> None:
    """What a run's last checkpoint is worth, in its architecture's terms.

    Args:
        folder: the run folder.
        split: of the data.
        steps: steps of the walk; the run's own by default.
    """
    at_least_one(steps=steps)
    adapter, walker = jobs.open_run(folder)
    show(adapter.metric, adapter.evaluate(walker, split, steps=steps))


def sample(
    folder: Folder,
    to: Path | None = None,
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
    """Samples of a run's last checkpoint, and how they came about.

    Args:
        folder: the run folder.
        to: where to write them; the run folder's samples/ by default.
        count: how many.
        seed: of the noise they start from.
        steps: steps of the walk; the run's own by default.
        prompt: text to go on with; for masked text it may have gaps to fill, each place a \u2591.
        length: characters of a text, behind the prompt, for masked text with it.
        temperature: of the network's distribution over tokens.
        top_k: keep only the likeliest tokens, so many.
        top_p: keep only the likeliest tokens, of this probability together.
        guidance: of images, how many times what the class changes counts; the run's own by default.
        sampler: of images; the run's own by default.
        label: images of this class alone.
        judge: a pretrained network that judges them against the test split, into judge.json: for text a GPT-2 or BERT
            of transformers, by name or folder (MAUVE); for images "inception" (FID and KID). Take thousands.
    """
    at_least_one(count=count, steps=steps)
    adapter, walker = jobs.open_run(folder)
    of_texts = dict(prompt=prompt, length=length, temperature=temperature, top_k=top_k, top_p=top_p)
    of_images = dict(guidance=guidance, sampler=sampler, label=label)
    given = dict(steps=steps, judge=judge, **of_texts, **of_images)
    options = {name: value for name, value in given.items() if value is not None}
    for path in jobs.sample(adapter, walker, to or folder / "samples", count=count, seed=seed, **options):
        print(path)


def at_least_one(**numbers: int | None) -> None:
    """Raise ValueError if a number is given that is less."""
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")


def predict(folder: Folder, images: Annotated[tuple[Path, ...], tyro.conf.Positional]) -> None:
    """Labels of image files, one JSON object a line: file, label, probability.

    Args:
        folder: the run folder.
        images: files of the size the model was trained on.
    """
    for line in predict_images(*jobs.open_run(folder), images):
        print(json.dumps(line))


def plot(folder: Folder) -> None:
    """Draw a finished run's pictures again.

    Args:
        folder: the run folder.
    """
    for path in plots.draw(folder):
        print(path)


def export(folder: Folder, to: Path) -> None:
    """Write a run's averaged weights as one safetensors file; diffusionblocks.load_model reads it back.

    Args:
        folder: the run folder.
        to: the file to write, ending in .safetensors.
    """
    exporting.export(*jobs.open_run(folder), to)
    print(to)


def show_plan(config: Annotated[Run, tyro.conf.arg(name="")], memory: str | None = None) -> None:
    """The bytes a run will take on its device, by category, for every number of blocks.

    Args:
        config: the run.
        memory: also name the smallest number of blocks that fits, e.g. 24GiB.
    """
    rows = plans(adapter_of(config), jobs.pick_device(config.device))
    title = f"{config.architecture}, batch {config.batch_size}, shared={config.shared!r}"
    table = Table("B", *CATEGORIES, "total", title=title)
    for blocks, usage in rows.items():
        table.add_row(str(blocks), *(readable(usage.by_category[c]) for c in CATEGORIES), readable(usage.total))
    console.print(table)
    if memory:
        fit = smallest_fit(rows, parse_bytes(memory))
        least = min(usage.total for usage in rows.values())
        print(f"B = {fit} fits in {memory}" if fit else f"nothing fits in {memory}: the least is {readable(least)}")
        if not fit:
            sys.exit(1)


def report(config: TrainConfig, summary: dict[str, Any]) -> None:
    """Print a run's table."""
    metric = adapter_of(config).metric
    table = Table("training", f"test {metric.label}", "val", "seconds", "memory", "plan", title=str(config.out))
    for name, result in summary["results"].items():
        memory = readable(sum(result["memory"].values()))
        planned = readable(sum(result["plan"].values())) if "plan" in result else "-"
        values = [f"{result[split][metric.key]:.4g}" for split in ("test", "val")]
        table.add_row(name, *values, f"{result['seconds']:.0f}", memory, planned)
    console.print(table)
    show(metric, summary["results"]["block-wise"]["test"])


def show(metric: Metric, result: dict[str, Any]) -> None:
    """Print what an evaluation found: its numbers, the walk, the information bound."""
    numbers = {k: v for k, v in result.items() if isinstance(v, float) and k not in (metric.key, "bound_bits")}
    console.print(f"{metric.label} {result[metric.key]:.4g}", *(f"{k} {v:.4g}" for k, v in numbers.items()), sep="; ")
    if "walk" in result:
        walk = Table("step", "sigma", "block", metric.label, title="along the walk")
        for step in result["walk"]:
            walk.add_row(str(step["step"]), f"{step['sigma']:.4g}", str(step["block"]), f"{step[metric.key]:.2f}")
        console.print(walk)
    if "bound_bits" in result:
        regret = ", ".join(f"{bits:+.3f}" for bits in result["regret_bits"])
        console.print(f"information bound {result['bound_bits']:.3f} bits; regret by block {regret}")


def main() -> None:
    """Parse the command line and run the command; an error a user can mend is one line and exit code 2."""
    commands: dict[str, Callable[..., Any]] = {
        "train": train,
        "resume": resume,
        "eval": evaluate,
        "sample": sample,
        "predict": predict,
        "plot": plot,
        "export": export,
        "plan": show_plan,
    }
    try:
        tyro.extras.subcommand_cli_from_dict(commands, prog="dblocks", description=__doc__, config=FLAGS)
    except (ValueError, TypeError, OSError, ImportError, NonFiniteLoss) as error:
        print(f"dblocks: {error}", file=sys.stderr)
        sys.exit(2)
