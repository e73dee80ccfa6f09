"""Language models in blocks under lm-evaluation-harness: lm-eval --model diffusionblocks --model_args pretrained=FOLDER

Found by its entry point, from 0.4.14 on; before, import this module. What a continuation's log-likelihood is depends on
the model, and `likelihood` says it:

- "exact": blocks that don't see z (`cond=0`) and answer with the mean of their logits.
- "first step": what the first block says at the highest noise, where z holds nothing: a distribution, of one block.
- "bound": of masked models, a lower bound on the log-likelihood (MD4), by draws of masks: no match for the others.
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from ..blocks import DiffusionBlocks
from ..checkpoint.manifest import CheckpointError
from ..convert.pretrained import load
from ..noise import mask_schedule
from ..noise.rng import stream
from ..sampling.generate import generate
from ..targets.masked import MaskedTarget


@register_model("diffusionblocks")
class BlocksLM(TemplateLM):
    """A causal or masked language model of db.convert.

    Args:
        pretrained: Folder that `model.save_pretrained` wrote, or the model itself.
        tokenizer: One of transformers, or its name or folder; by default the model's folder.
        max_length: Tokens that it reads, context and continuation.
        device: A torch device.
        draws: Of the masks, for a masked model's bound: levels of noise, evenly spread.
        seed: Of what is drawn.
        batch_size: Taken, and not used: a request is a batch of its own.

    Raises: ValueError if the model writes no text, or the tokenizer has other tokens.
    """

    backend = "causal"

    def __init__(
        self,
        pretrained: str | DiffusionBlocks,
        tokenizer: Any = None,
        *,
        max_length: int = 1024,
        device: str = "cpu",
        draws: int = 32,
        seed: int = 0,
        batch_size: Any = 1,
    ):
        super().__init__()
        if isinstance(pretrained, DiffusionBlocks):
            self.model = pretrained
        else:
            self.model = load(pretrained)
            self.model.to(device)
        self.tokenizer = _tokenizer(pretrained if tokenizer is None else tokenizer)
        self.max_length, self.draws, self.seed = max_length, draws, seed
        stem = self.model.blocks[0].around(self.model.stem_head).stem
        if isinstance(self.model.target, MaskedTarget):
            self.likelihood, size = "bound", self.model.target.mask_id
        elif hasattr(stem, "decode"):
            self.likelihood = "exact" if self.model.ensemble else "first step"
            size = self.model.target.num_classes
        else:
            raise ValueError("this model writes no text: lm-eval takes causal and masked language models of db.convert")
        if len(self.tokenizer) > size:
            raise ValueError(f"the tokenizer has {len(self.tokenizer)} tokens, the model {size}: give the model's own")

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text, which also stands in front of one without context."""
        found: int | None = self.tokenizer.eos_token_id
        return 0 if found is None else found

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, for lm-eval's cache."""
        return str(self.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the tokens of a text."""
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens))
        return ids

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **_: Any) -> list[tuple[float, bool]]:
        found = []
        for cached, context, continuation in requests:
            tokens = torch.tensor([(context + continuation)[-self.max_length :]], device=self.model.device)
            count = min(len(continuation), tokens.shape[1] - 1)
            found.append(self.score(tokens, count))
            if cached is not None:
                self.cache_hook.add_partial("loglikelihood", cached, found[-1])
        return found

    @torch.no_grad()
    def score(self, tokens: Tensor, count: int) -> tuple[float, bool]:
        """Return the log-likelihood of the last `count` of tokens (1, N), and whether each is the likeliest one."""
        training = self.model.training
        try:
            self.model.eval()
            with self.model.averages():
                return self._bound(tokens, count) if self.likelihood == "bound" else self._read(tokens, count)
        finally:
            self.model.train(training)

    def _read(self, tokens: Tensor, count: int) -> tuple[float, bool]:
        x, y = tokens[:, :-1], tokens[0, -count:]
        if self.model.ensemble:
            logits = self.model.logits(x)
        else:
            z = torch.zeros(*x.shape, self.model.target.table.shape[1], device=x.device)
            logits = self.model.denoise(x, z, self.model.partition.sigma_max).raw
        told = logits[0, -count:].double().log_softmax(-1)
        right = told.gather(-1, y.unsqueeze(-1)).sum()
        return float(right), bool((told.argmax(-1) == y).all())

    def _bound(self, tokens: Tensor, count: int) -> tuple[float, bool]:
        """The mean over levels of weight(t) times the masks' log-probability; the guess is of all masks at once."""
        target, given, total = self.model.target, tokens.shape[1] - count, 0.0
        assert isinstance(target, MaskedTarget)
        for i in range(self.draws):
            t = (i + 0.5) / self.draws
            level = torch.full((1,), t, device=tokens.device)
            z = target.noised(tokens, level, seed=stream(self.seed, "lm-eval"), offset=i)
            z[:, :given] = tokens[:, :given]
            told = self.model.denoise(tokens[:, :0], z, t).raw.double().log_softmax(-1)
            masked = (z == target.mask_id).squeeze(0)
            right = told[0].gather(-1, tokens[0].unsqueeze(-1)).squeeze(-1)
            total += float(mask_schedule.weight(level)) * float(right[masked].sum()) / self.draws
        z = tokens.clone()
        z[:, given:] = target.mask_id
        guess = self.model.denoise(tokens[:, :0], z, 1.0).raw[0, given:].argmax(-1)
        return total, bool((guess == tokens[0, given:]).all())

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, in windows of max_length."""
        found = []
        for request in requests:
            ids, total = self.tok_encode(request.args[0]), 0.0
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length - 1, 1)
            for context, continuation in map(make_disjoint_window, windows):
                total += self._loglikelihood_tokens([(None, context, continuation)])[0][0]
            found.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return found

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Return what follows each context, up to a stop or `max_gen_toks` tokens."""
        found = []
        for request in requests:
            context, options = request.args
            stops = options.get("until") or []
            stops = [stops] if isinstance(stops, str) else stops
            count = int(options.get("max_gen_toks", 64))
            ids = (self.tok_encode(context) or [self.prefix_token_id])[-(self.max_length - count) :]
            sampled = options.get("do_sample", False) and options.get("temperature", 1.0) > 0
            how = {"temperature": options.get("temperature", 1.0)} if sampled else {"top_k": 1}
            prompt = torch.tensor([ids], device=self.model.device)
            eos = self.tokenizer.eos_token_id
            made = generate(self.model, prompt, max_new_tokens=count, eos_token_id=eos, seed=self.seed, **how)
            text: str = self.tokenizer.decode(made[0, len(ids) :].tolist(), skip_special_tokens=True)
            for stop in stops:
                text = text.partition(stop)[0] if stop else text
            found.append(text)
            self.cache_hook.add_partial("generate_until", request.args, text)
        return found


def _tokenizer(given: Any) -> Any:
    if isinstance(given, DiffusionBlocks):
        raise ValueError("a model in memory needs tokenizer=: one of transformers, or its name")
    if not isinstance(given, str):
        return given
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(given)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{given} has no tokenizer: give tokenizer=NAME ({error})") from error
