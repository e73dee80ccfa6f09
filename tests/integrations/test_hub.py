"""Models on the Hub, by a stand-in for it that is a folder."""

from __future__ import annotations

import fnmatch
import shutil
from types import SimpleNamespace

import pytest
import torch

import diffusionblocks as db
import tiny_transformers as tiny
from diffusionblocks.card import model_card

hub = pytest.importorskip("diffusionblocks.integrations.hub", exc_type=ImportError)
pytest.importorskip("transformers")


class FolderHub:
    """The calls of HfApi that are used, on a folder."""

    root, calls = None, []

    def __init__(self, token=None):
        self.calls.append(token)

    def create_repo(self, repo_id, *, private, exist_ok):
        assert exist_ok
        (self.root / "me" / repo_id).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def file_exists(self, repo_id, name):
        return (self.root / repo_id / name).exists()

    def hf_hub_download(self, repo_id, name):
        return str(self.root / repo_id / name)

    def upload_folder(self, *, repo_id, folder_path, commit_message, delete_patterns):
        for path in (self.root / repo_id).iterdir():
            if fnmatch.fnmatch(path.name, delete_patterns):
                path.unlink()
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        return SimpleNamespace(commit_url=f"hub/{repo_id}")


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.setattr(FolderHub, "root", tmp_path / "hub")
    monkeypatch.setattr(hub.huggingface_hub, "HfApi", FolderHub)
    return tmp_path / "hub" / "me" / "name"


def test_an_offloaded_model_is_pushed_and_loaded(repository, tmp_path):
    model = tiny.convert(tiny.network("LlamaForCausalLM"), 4)
    trainer = db.Trainer(model, device="cpu", offload="disk", folder=tmp_path / "wait", visit=1)
    x, y = tiny.batch("LlamaForCausalLM")
    for _ in range(4):
        trainer.step(x, y)
    model.eval()
    assert model.push_to_hub("name", token="secret") == "hub/me/name" and FolderHub.calls[-1] == "secret"
    assert torch.equal(db.load(repository)(x), model(x))
    card = (repository / "README.md").read_text()
    assert (
        card.count("\n# name\n") == 1
        and "A `LlamaForCausalLM` in 4 blocks" in card
        and 'snapshot_download("me/name"))' in card
    )
    count = sum(p.numel() for p in model.blocks[3].parameters())
    low, high = model.partition.owned(3)
    assert f"| 3 | 1 | {high:.4g} to {low:.4g} | {count:,} |" in card


def test_a_smaller_model_replaces_a_larger_one_and_its_card_but_not_yours(repository):
    for blocks in (4, 2):
        model = tiny.convert(tiny.network("ViTForImageClassification"), blocks).eval()
        hub.push_to_hub(model, "name")
    assert len(list(repository.glob("model.block_*"))) == 2 and "in 2 blocks" in (repository / "README.md").read_text()
    (repository / "README.md").write_text("mine")
    hub.push_to_hub(model, "name")
    assert (repository / "README.md").read_text() == "mine"
    x, _ = tiny.batch("ViTForImageClassification")
    assert torch.equal(db.load(repository)(x), model(x))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_another_programs_model_is_never_overwritten(repository, name):
    repository.mkdir(parents=True)
    (repository / name).write_text("{}")
    with pytest.raises(ValueError, match="me/name holds a model that diffusionblocks didn't upload"):
        tiny.convert(tiny.network("ViTForImageClassification", layers=1), 1).push_to_hub("name")
    assert [path.name for path in repository.iterdir()] == [name]


def test_a_folder_has_a_card_of_its_own_or_keeps_yours(tmp_path):
    for blocks in (2, 1):
        model = tiny.convert(tiny.network("ViTForImageClassification", layers=2), blocks)
        model.save_pretrained(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'model = db.load("out")' in card and "transformers doesn't load these files" in card
    assert "huggingface_hub" not in card and "in 1 blocks" in card, "the model's, not the one's before"
    (tmp_path / "out" / "README.md").write_text("mine")
    model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == "mine"


def test_the_card_of_code_asks_for_it():
    layers = [torch.nn.Linear(8, 8) for _ in range(2)]
    model = db.from_layers(
        layers, stem=torch.nn.Linear(4, 8), head=torch.nn.Linear(8, 3), target=db.LabelTarget(3, 8), blocks=2,
        shared="per_block",
    )  # fmt: skip
    card = model_card(model, "name")
    assert ", build())" in card and "a stem and head of its own" in card and "`LabelTarget`" in card
