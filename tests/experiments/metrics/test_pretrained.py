"""Pretrained judges: the packages' inputs, and that they distinguish samples from real data."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from diffusionblocks.experiments import commands
from diffusionblocks.experiments.metrics import pretrained
from diffusionblocks.experiments.models.causal_lm import CausalLMConfig
from diffusionblocks.experiments.models.dit import DiTConfig
from diffusionblocks.experiments.models.masked_lm import MaskedLMConfig
from diffusionblocks.experiments.tasks.causal_lm import CausalLMRun, CausalLMTask
from diffusionblocks.experiments.tasks.dit import DiTRun, DiTTask
from diffusionblocks.experiments.tasks.masked_lm import MaskedLMRun, MaskedLMTask

CPU = torch.device("cpu")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> str:
    """The folder of a small GPT-2 of random weights that reads letters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2Model, PreTrainedTokenizerFast  # seconds, which collecting shouldn't take

    folder = tmp_path_factory.mktemp("gpt2")
    words = {letter: i for i, letter in enumerate([*LETTERS, "?"])}
    letters = Tokenizer(models.WordLevel(words, unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="?", unk_token="?").save_pretrained(folder)
    torch.manual_seed(0)
    GPT2Model(GPT2Config(vocab_size=len(words), n_positions=64, n_embd=16, n_layer=1, n_head=2)).save_pretrained(folder)
    return str(folder)


def strings(letters: str, seed: int, count: int = 200) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(letters), (count, 12), generator=generator).tolist()
    return ["".join(letters[i] for i in row) for row in drawn]


def test_mauve_falls_with_the_letters_that_texts_lack(gpt2):
    real = strings(LETTERS, 0)
    half = strings(LETTERS[:13], 1)
    scores = [pretrained.mauve(texts, real, gpt2, device=CPU) for texts in (real, half, strings("z", 2))]
    assert scores[0] == pytest.approx(1, abs=1e-3) and scores[0] > scores[1] + 0.1 > scores[2] + 0.2


def test_texts_of_a_run_are_judged_against_the_test_split(gpt2, tmp_path, monkeypatch):
    given, score = [], pretrained.mauve
    monkeypatch.setattr(pretrained, "mauve", lambda *a, **k: given.append(a) or score(*a, **k))
    common = dict(steps=2, blocks=2, baseline=(), length=16, batch_size=2)
    masked = MaskedLMRun(out=tmp_path / "masked", model=MaskedLMConfig(dim=16, layers=2, heads=2), **common)
    causal = CausalLMRun(out=tmp_path / "causal", model=CausalLMConfig(dim=16, layers=2, heads=2, mlp=16), **common)
    for kind, config in ((MaskedLMTask, masked), (CausalLMTask, causal)):
        task = kind(config)
        trainer, _ = commands.open_trainer(task)
        options = {} if kind is MaskedLMTask else {"length": 16}
        commands.sample(task, trainer.model, config.out / "samples", count=8, seed=0, judge=gpt2, **options)
        verdict = json.loads((config.out / "samples" / "judge.json").read_text())
        assert 0 <= verdict["mauve"] <= 1 and verdict["judge_bits"] > 0
        texts, real, network = given.pop()
        assert "\n\n----\n\n".join(texts) + "\n" == (config.out / "samples" / "samples.txt").read_text()
        whole = task.data.decode(task.data.test)
        assert network == gpt2 and len(real) == 8 and all(len(window) == 16 and window in whole for window in real)
        assert real[0] == whole[:16] and real[-1] == whole[-16:], "spread over all of the test text"


def test_a_missing_judge_is_an_error_with_advice(monkeypatch):
    with pytest.raises(ValueError, match="judge='llama' must be a GPT-2 or a BERT"):
        pretrained.mauve(["a"], ["b"], "llama", device=CPU)
    monkeypatch.setitem(sys.modules, "mauve", None)
    with pytest.raises(ImportError, match=r"pip install 'diffusionblocks\[mauve\]'"):
        pretrained.mauve(["a"], ["b"], "gpt2", device=CPU)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(ImportError, match=r"pip install 'diffusionblocks\[fid\]'"):
        pretrained.inception(images, images, device=CPU)
    for wrong in (images.float(), images[0], images[:1], images.expand(2, 2, 8, 8)):
        with pytest.raises(ValueError, match="generated must be uint8"):
            pretrained.inception(wrong, images, device=CPU)


def test_images_of_a_run_are_judged_against_the_test_split(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(pretrained, "inception", lambda *a, **k: given.append(a) or {"fid": 3.0, "kid": 0.5})
    model = DiTConfig(dim=16, layers=2, heads=2, mlp=24, cond=8, patch=4)
    task = DiTTask(DiTRun(out=tmp_path, model=model, blocks=2, steps=2, sampling_steps=2, baseline=()))
    trainer, _ = commands.open_trainer(task)
    files = commands.sample(task, trainer.model, tmp_path / "samples", count=5, seed=0, judge="inception")
    assert json.loads(files[-1].read_text()) == {"fid": 3.0, "kid": 0.5} and files[-1].name == "judge.json"
    ((made, real),) = given
    assert made.dtype == torch.uint8 and made.shape == (5, 1, 8, 8) and torch.equal(real, task.data.test.images)
    with pytest.raises(ValueError, match="judge='gpt2' must be 'inception' for images"):
        commands.sample(task, trainer.model, tmp_path / "other", count=5, seed=0, judge="gpt2")


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
def test_inception_distinguishes_images(tmp_path, monkeypatch, channels):
    """Its network with random weights: the published ones can't be fetched everywhere."""
    pytest.importorskip("torch_fidelity")
    from torch_fidelity import feature_extractor_inceptionv3 as package

    def drawn(network, state):
        for p in network.parameters():
            if p.dim() > 1:
                torch.nn.init.kaiming_normal_(p)

    torch.manual_seed(0)
    monkeypatch.setattr(package, "load_state_dict_from_url", lambda *a, **k: {})
    monkeypatch.setattr(package.FeatureExtractorInceptionV3, "load_state_dict", drawn)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (24, channels, 8, 8), generator=generator, dtype=torch.uint8)
    same = pretrained.inception(noise, noise.flip(0), device=CPU)
    other = pretrained.inception(noise // 4, noise, device=CPU)
    assert abs(same["fid"]) < 1e-3 * other["fid"] and abs(same["kid"]) < other["kid"]
