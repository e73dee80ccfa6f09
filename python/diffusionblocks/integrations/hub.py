"""Models on the Hugging Face Hub: their folder, and a card of what it holds."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import huggingface_hub
from torch import nn

from ..blocks import DiffusionBlocks

CARD = "README.md"
SHARDS = "model.*.safetensors"
SHARING = {
    "shared": "All blocks have one stem and head, and trained them.",
    "frozen": "All blocks have one stem and head, which weren't trained.",
    "per_block": "Each block has a stem and head of its own.",
}


def push_to_hub(
    model: DiffusionBlocks,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload a model of DiffusionBlocks",
    extra: dict[str, Any] | None = None,
) -> str:
    """Upload what save_pretrained writes, and a card if the repository has none; return the commit's address.

    `load(huggingface_hub.snapshot_download(repo_id))` gives the model back. The licence is yours to state, in the card.

    Args:
        model: Averaged weights are uploaded where there are any; of offloaded blocks one at a time is in memory.
        repo_id: "name" or "owner/name"; made if missing.
        private: Whether a new repository is; None: as the owner's default.
        token: Of the Hub; None: the one that `hf auth login` stored.
        commit_message: Of the upload, which is one commit.
        extra: As for save_pretrained.

    Raises: OSError where the temporary folder has no room for the model; huggingface_hub's errors.
    """
    hub = huggingface_hub.HfApi(token=token)
    repo_id = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, extra=extra)
        if not hub.file_exists(repo_id, CARD):
            Path(folder, CARD).write_text(model_card(model, repo_id), encoding="utf-8")
        commit = hub.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            delete_patterns=SHARDS,  # of an older model with more blocks
        )
    return str(commit.commit_url)


def model_card(model: DiffusionBlocks, repo_id: str) -> str:
    """Return a model card, Markdown, of the facts that a model knows; its licence, data and results are left open."""
    rows = "\n".join(_row(model, block) for block in range(len(model.blocks)))
    if model.origin:
        network, build, note = f"A `{model.origin['kind'].rpartition('.')[2]}`", "", ""
    else:
        network, build = "A network", ", build()"
        note = "\n`build()` is the code that built the model, which a file can't hold: add it here.\n"
    adapter = "import diffusionblocks.integrations.peft  # the network has an adapter\n"
    dtypes = " and ".join(sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()}))
    return f"""---
library_name: diffusionblocks
tags:
- diffusionblocks
---

# {repo_id.rpartition("/")[2]}

{network} in {len(model.blocks)} blocks by DiffusionBlocks: each block is a denoiser for its own range of noise levels,
trained without the others ([paper](https://arxiv.org/abs/2506.14202)).

| block | layers | noise levels (sigma) | parameters |
|---|---|---|---|
{rows}

{SHARING[model.shared]} The target is `{type(model.target).__name__}`. {_count(model)} parameters in all, {dtypes}.

## Use

```python
import diffusionblocks as db
{adapter if hasattr(model, "peft_config") else ""}from huggingface_hub import snapshot_download

model = db.load(snapshot_download("{repo_id}"){build})
answer = model(x)
```
{note}
Licence, training data and results: not stated yet.
"""


def _row(model: DiffusionBlocks, block: int) -> str:
    low, high = model.partition.owned(block)
    return f"| {block} | {model.partition.layers[block]} | {high:.4g} to {low:.4g} | {_count(model.blocks[block])} |"


def _count(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()):,}"
