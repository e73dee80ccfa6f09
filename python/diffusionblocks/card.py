"""Cards of models, Markdown: what the Hugging Face Hub shows of a folder, and how it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from .checkpoint import atomic
from .targets.continuous import ContinuousTarget
from .targets.labels import LabelTarget
from .targets.masked import MaskedTarget
from .targets.tokens import TokenTarget

CARD = "README.md"
OURS = "<!-- Written with the model, and anew with the next one while this line stays. -->"
LIBRARIES = ("transformers", "diffusers", "timm")  # whose networks `convert` knows
SHARING = {
    "shared": "All blocks share one stem and head, which each of them trained.",
    "frozen": "All blocks share one stem and head, which weren't trained.",
    "per_block": "Each block has a stem and head of its own.",
}


def write_card(model: Any, folder: Path, *, run: bool = False) -> None:
    """Write a model's card into its folder, unless there is one that somebody wrote. run: as `model_card`."""
    card = folder / CARD
    if not card.exists() or (card.is_file() and is_own(card.read_text(encoding="utf-8", errors="replace"))):
        atomic.write(card, [model_card(model, folder.resolve().name, run=run).encode()])


def model_card(model: Any, name: str, *, repo_id: str | None = None, run: bool = False) -> str:
    """Return a card of the facts that DiffusionBlocks know of themselves; licence, data and results are left open.

    repo_id: The Hub's repository that the model is loaded from; None: the folder `name`. run: The model is of a run of
        `dblocks`, which knows how to build it.
    """
    rows = "\n".join(_row(model, block) for block in range(len(model.blocks)))
    network = f"A `{model.origin['kind'].rpartition('.')[2]}`" if model.origin else "A network"
    return f"""---
library_name: diffusionblocks
tags:
- diffusionblocks
---

# {name}

{network} in {len(model.blocks)} blocks by DiffusionBlocks: each block is a denoiser for its own range of noise levels,
trained without the others ([paper](https://arxiv.org/abs/2506.14202)).

| block | layers | noise levels (sigma) | parameters |
|---|---|---|---|
{rows}

{SHARING[model.shared]} The target is `{type(model.target).__name__}`. {_count(model)} parameters in all.

## Use

{_use_of_a_run(model, name) if run else _use(model, name, repo_id)}
Licence, training data and results: not stated yet.

{OURS}
"""


def _use_of_a_run(model: Any, name: str) -> str:
    other = f"dblocks predict {name} IMAGES" if isinstance(model.target, LabelTarget) else f"dblocks sample {name}"
    return f"""`dblocks eval {name}` and `{other}`; in Python:

```python
from pathlib import Path

import diffusionblocks as db
from diffusionblocks.experiments.export import open_exported

task, model = open_exported(Path("{name}"))
{_answer(model)}
```
"""


def _use(model: Any, name: str, repo_id: str | None) -> str:
    if model.origin:
        library, build = model.origin["kind"].partition(".")[0], ""
        given = ": `db.to_original(model)` makes networks of its classes"
        if library not in LIBRARIES:
            given = ", and `db.load` needs the code that registered the network's class"
        elif model.origin["options"].get("cond") != 0 and not isinstance(model.target, ContinuousTarget):
            given = ": the layers have AdaLN, for which its classes have no place"
        note = f"\n{library} doesn't load these files{given}.\n"
    else:
        build = ", build()"
        note = "\n`build()` is the code that built the model, which a file can't hold: add it here.\n"
    adapter = "import diffusionblocks.integrations.peft  # the network has an adapter\n"
    download = "from huggingface_hub import snapshot_download\n"
    return f"""```python
import diffusionblocks as db
{adapter if hasattr(model, "peft_config") else ""}{download if repo_id else ""}
model = db.load({f'snapshot_download("{repo_id}")' if repo_id else f'"{name}"'}{build})
{_answer(model)}
```
{note}"""


def _answer(model: Any) -> str:
    if isinstance(model.target, ContinuousTarget):
        return "y = db.sample(model, x, seed=0)"
    texts = isinstance(model.target, (TokenTarget, MaskedTarget)) and model.origin
    if texts and model.origin["kind"].partition(".")[0] in LIBRARIES:
        return "ids = db.generate(model, prompt_ids, max_new_tokens=20)"
    return "logits = model(x)  # of the likeliest answer"


def is_own(text: str) -> bool:
    """Return whether a card is one that nobody has taken over: the next model's takes its place."""
    return OURS in text


def _row(model: Any, block: int) -> str:
    low, high = model.partition.owned(block)
    return f"| {block} | {model.partition.layers[block]} | {high:.4g} to {low:.4g} | {_count(model.blocks[block])} |"


def _count(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()):,}"
