"""One method's way from a prefill to an answer: choose, prune, decode step by step, record."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dynamickv.cache import KVCache, prune
from dynamickv.decode import Step, TextStream, decode, extend
from dynamickv.events import Compressed, Token
from dynamickv.methods import CompressionMethod, ScoredMethod
from dynamickv.models import LoadedModel
from dynamickv.prompt import EncodedPrompt
from dynamickv.records import Prefill, Retention
from dynamickv.together import Together
from dynamickv.trace import Retained, Run, Scores


class Answer:
    """One method's cache and the answer growing from it."""

    def __init__(
        self,
        llm: LoadedModel,
        prefill: Prefill,
        prompt: EncodedPrompt,
        method: CompressionMethod,
        max_new_tokens: int,
        scores: bool,
        together: Together | None = None,
    ) -> None:
        self._prefill, self._prompt, self._method = prefill, prompt, method
        self._together = together
        start = time.perf_counter()
        self._retention = select(method, prefill)
        llm.synchronize()
        self._score_seconds = time.perf_counter() - start
        if method.needs_mass:
            self._score_seconds += prefill.mass_seconds
        start = time.perf_counter()
        room = min(max_new_tokens, max(llm.geometry.max_positions - prompt.length, 0))
        later = prompt.token_ids[prefill.length :]
        cache = prune(prefill, self._retention, room + len(later))
        llm.synchronize()
        self._prune_seconds = time.perf_counter() - start
        logits = extend(llm, cache, later, prefill.length) if later else prefill.logits
        self._kv_bytes = cache.nbytes
        self._mask = retained_mask(self._retention, prompt.length)
        self._scores = layer_scores(method, prefill, prompt.length) if scores else None
        self._cache: KVCache | None = cache
        # A run that keeps everything is decoded alone, so that it equals FullKV to the last bit.
        alone = together is None or bool(self._mask.all())
        self._member = None if alone or together is None else together.join(cache, prompt.length)
        advance = self._member.advance if self._member else None
        self._steps: Iterator[Step] = decode(
            llm, cache, logits, prompt.length, max_new_tokens, advance
        )
        self._text = TextStream(llm)
        self._done: list[Step] = []
        self.finish_reason: str | None = None

    def compressed(self, index: int) -> Compressed:
        """What was kept, before any token is decoded."""
        return Compressed(
            run=index,
            method=self._method.name,
            budgets=self._retention.budgets,
            kept_fraction=float(self._mask.mean()),
            kv_bytes=self._kv_bytes,
            score_seconds=self._score_seconds,
            prune_seconds=self._prune_seconds,
        )

    def step(self, index: int) -> Token:
        """Decode one token."""
        step = next(self._steps)
        self._done.append(step)
        self._text.push(step.token_id, final=step.last is not None)
        self.finish_reason = step.last
        if self._member is not None and step.last is None:
            self._member.announce(step.token_id)
        return Token(index, self._method.name, step.token_id, self._text.text, step.seconds)

    def finish(self) -> Run:
        """The record of this answer; its cache is freed."""
        self._cache = None
        self._steps = iter(())
        if self._member is not None:
            self._member.leave()
        return Run(
            method=self._method.name,
            parameters=self._method.parameters,
            answer=self._text.text,
            token_ids=[step.token_id for step in self._done],
            pieces=self._text.pieces,
            logprobs=[step.logprob for step in self._done],
            finish_reason=self.finish_reason or "cancelled",
            budgets=self._retention.budgets,
            budget_history=[list(update) for update in self._retention.budget_history],
            retained=Retained.pack(self._mask),
            scores=None if self._scores is None else Scores.pack(self._scores),
            kv_bytes=self._kv_bytes,
            kv_bytes_full=self._prefill.kv_bytes // self._prefill.length * self._prompt.length,
            kept_fraction=float(self._mask.mean()),
            score_seconds=self._score_seconds,
            prune_seconds=self._prune_seconds,
            decode_seconds=[step.seconds for step in self._done],
            decoded_together=self._together.size if self._member and self._together else 1,
        )


@torch.inference_mode()
def select(method: CompressionMethod, prefill: Prefill) -> Retention:
    """A method's choice over a prefill."""
    return method.select(prefill.layers)


def retained_mask(retention: Retention, length: int) -> np.ndarray:
    """Boolean (layers, heads, length); what was fed after the compression is kept."""
    mask = np.zeros((len(retention.indices), retention.indices[0].shape[0], length), bool)
    mask[:, :, retention.prompt_length :] = True
    for layer, kept in enumerate(retention.indices):
        np.put_along_axis(mask[layer], kept.cpu().numpy(), True, axis=1)
    return mask


@torch.inference_mode()
def layer_scores(method: CompressionMethod, prefill: Prefill, length: int) -> np.ndarray | None:
    """Scores averaged over heads, each layer scaled to 0..255, uint8 (layers, length).

    The window and what follows it read 255. None for a method without scores and for a prompt that
    is not longer than the window.
    """
    if not isinstance(method, ScoredMethod) or prefill.length <= method.window_size:
        return None
    table = np.full((len(prefill.layers), length), 255, np.uint8)
    for index, layer in enumerate(prefill.layers):
        scores: Tensor = method.score(layer).mean(dim=0)
        scaled = scores / scores.max().clamp_min(torch.finfo(torch.float32).tiny) * 255
        table[index, : scores.shape[0]] = scaled.round().to(torch.uint8).cpu().numpy()
    return table
