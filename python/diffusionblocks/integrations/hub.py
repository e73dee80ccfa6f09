"""Models on the Hugging Face Hub."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import huggingface_hub

from ..blocks import DiffusionBlocks
from ..card import CARD, is_own, model_card
from ..checkpoint.manifest import CheckpointError

SHARDS = "model.*.safetensors"


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

    Raises:
        CheckpointError: The repository holds another program's model, which is never overwritten.
        OSError: The temporary folder has no room for the model; or one of huggingface_hub's errors.
    """
    hub = huggingface_hub.HfApi(token=token)
    repo_id = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
    _refuse_foreign(hub, repo_id)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, extra=extra)
        card = Path(folder, CARD)
        if hub.file_exists(repo_id, CARD) and not is_own(_text(hub, repo_id, CARD)):
            card.unlink()
        else:
            card.write_text(model_card(model, repo_id.rpartition("/")[2], repo_id=repo_id), encoding="utf-8")
        commit = hub.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            delete_patterns=SHARDS,  # of an older model with more blocks
        )
    return str(commit.commit_url)


def _refuse_foreign(hub: Any, repo_id: str) -> None:
    foreign = hub.file_exists(repo_id, "model.safetensors")
    if not foreign and hub.file_exists(repo_id, "config.json"):
        config = json.loads(_text(hub, repo_id, "config.json"))
        foreign = config.get("model_type") != "diffusionblocks"
    if foreign:
        raise CheckpointError(f"{repo_id} holds a model that diffusionblocks didn't upload: give another repo_id")


def _text(hub: Any, repo_id: str, name: str) -> str:
    return Path(hub.hf_hub_download(repo_id, name)).read_text(encoding="utf-8")
