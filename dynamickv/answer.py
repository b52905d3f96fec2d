"""One method's way from a prefill to an answer: choose, prune, decode step by step, record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from dynamickv.cache import KVCache, prune
from dynamickv.decoding.alignment import Growing
from dynamickv.decoding.decode import Step, TextStream, decode, extend
from dynamickv.decoding.forgetting import Choice, forgetting_of
from dynamickv.decoding.together import Member, Together
from dynamickv.methods import CompressionMethod, ScoredMethod
from dynamickv.methods.decoding import Decoding
from dynamickv.models import LoadedModel
from dynamickv.models.geometry import require_choosable
from dynamickv.reading.prefill import TAIL
from dynamickv.record.events import Compressed, Token
from dynamickv.record.trace import Forgotten, Retained, Run, Scores
from dynamickv.records import EncodedPrompt, Prefill, Retention
from dynamickv.transfer import Stopwatch
from dynamickv.walk import Chosen


class Recording(TypedDict):
    """What a prefill records for methods, by the names of its arguments."""

    tail: int
    mass: bool


def recording_for(methods: Sequence[CompressionMethod]) -> Recording:
    """All that any of these methods reads."""
    return {
        "tail": max(TAIL, *(method.tail for method in methods)),
        "mass": any(method.needs_mass for method in methods),
    }


def of_prompt(method: CompressionMethod, decoding: Decoding | None) -> CompressionMethod:
    """What chooses for the prompt where compression goes on while answering."""
    if decoding is None or not method.capabilities.capacity:
        return method
    return decoding.of_prompt(method)


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
        decoding: Decoding | None = None,
        chosen: Chosen | None = None,
    ) -> None:
        """`chosen`: what the method, as `of_prompt` makes it, chose while the prompt was read."""
        if not method.capabilities.capacity:
            decoding = None
        method = of_prompt(method, decoding)
        self._prefill, self._prompt, self._method = prefill, prompt, method
        self._decoding = decoding
        scoring = Stopwatch(llm.device)
        self.retention = select(method, prefill) if chosen is None else chosen.retention
        scoring.stop()
        pruning = Stopwatch(llm.device)
        room = min(max_new_tokens, max(llm.geometry.max_positions - prompt.length, 0))
        later = prompt.token_ids[prefill.length :]
        # What chooses again takes memory as it grows.
        cache = prune(prefill, self.retention, room + len(later) if decoding is None else 0)
        pruning.stop()
        self._cache: KVCache | None = cache
        self._forgotten: list[Forgotten] = []
        self._choosing = 0.0
        """Seconds of choices that no token's time holds yet."""
        self._forgetting = forgetting_of(method, decoding, prefill, cache, self._note_choice)
        logits = prefill.logits
        if later:
            logits = extend(llm, cache, later, prefill.length, self._forgetting)
        self._kv_bytes = cache.nbytes
        whole = prefill.whole_bytes // prefill.length * prompt.length
        others = cache.others(llm.geometry.kinds)
        self._kv_bytes_full = whole + sum(other.nbytes for other in others.values())
        compressed = retained_mask(self.retention, prompt.length, llm.geometry.num_kv_heads)
        self._kept_fraction = share_kept(self.retention, prompt.length)
        held = {place: other.held for place, other in sorted(others.items())}
        self._mask = of_all_layers(compressed, prefill.places, held)
        self._budgets = in_place_order(self.retention.budgets, prefill.places, held)
        # The mask was waited for, and with it all that they measure.
        self._score_seconds = scoring.seconds() + (chosen.seconds if chosen else 0.0)
        if method.needs_mass:
            self._score_seconds += prefill.mass_seconds
        self._prune_seconds = pruning.seconds()
        self._scores = layer_scores(method, prefill, prompt.length) if scores else None
        self.keeps_everything = bool(self._mask.all())
        self._together: Together | None = None
        self._member: Member | None = None
        self._decode = partial(
            decode,
            llm,
            cache,
            logits,
            prompt.length,
            max_new_tokens,
            forgetting=self._forgetting,
        )
        self._steps: Iterator[Step] = self._decode()
        self._text = TextStream(llm)
        self._done: list[Step] = []
        self.finish_reason: str | None = None

    def again(self, room: int) -> Growing:
        """The cache as it was before the first token, anew, with room for as many."""
        room = room if self._decoding is None else 0
        cache = prune(self._prefill, self.retention, room)
        return cache, forgetting_of(self._method, self._decoding, self._prefill, cache)

    def join(self, together: Together) -> None:
        """Decode in one pass with the other runs that join, before the first step; nothing changes
        for a cache that such a pass cannot feed."""
        if self._cache is not None and together.takes(self._cache):
            self._together = together
            self._member = together.join(self._cache, self._prompt.length)
            self._steps = self._decode(advance=self._member.advance)

    def compressed(self, index: int) -> Compressed:
        """What was kept, before any token is decoded."""
        return Compressed(
            run=index,
            method=self._method.name,
            budgets=self._budgets,
            kept_fraction=self._kept_fraction,
            kv_bytes=self._kv_bytes,
            score_seconds=self._score_seconds,
            prune_seconds=self._prune_seconds,
        )

    def step(self, index: int) -> Token:
        """Decode one token."""
        step = next(self._steps)
        step = replace(step, seconds=step.seconds + self._choosing)
        self._choosing = 0.0
        self._done.append(step)
        self._text.push(step.token_id, final=step.last is not None)
        self.finish_reason = step.last
        if self._forgetting is not None and step.last is None:
            self._forgetting.make_room(1)
        if self._member is not None and step.last is None:
            self._member.announce(step.token_id)
        return Token(index, self._method.name, step.token_id, self._text.text, step.seconds)

    def _note_choice(self, choice: Choice) -> None:
        """Record what a choice while answering left."""
        assert self._cache is not None
        self._choosing += choice.seconds
        length = max(choice.seen, self._prompt.length)
        held = held_mask(self._cache, self._prefill.places, choice.seen, length)
        self._forgotten.append(
            Forgotten(
                position=length - self._prompt.length,
                retained=Retained.pack(held),
                seconds=choice.seconds,
            )
        )

    def finish(self) -> Run:
        """The record of this answer; its cache is freed."""
        if self._forgetting is not None:
            self._forgetting.end()
        self._cache = None
        self._decode = partial(iter, ())
        self._steps = self._decode()
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
            budgets=self._budgets,
            budget_history=[list(update) for update in self.retention.budget_history],
            retained=Retained.pack(self._mask),
            scores=None if self._scores is None else Scores.pack(self._scores),
            kv_bytes=self._kv_bytes,
            kv_bytes_full=self._kv_bytes_full,
            kept_fraction=self._kept_fraction,
            score_seconds=self._score_seconds,
            prune_seconds=self._prune_seconds,
            decode_seconds=[step.seconds for step in self._done],
            decoded_together=self._together.size if self._member and self._together else 1,
            erased=int((~self._mask.any(axis=(0, 1))).sum()),
            decoding=None if self._decoding is None else asdict(self._decoding),
            forgotten=self._forgotten,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """What a method would keep of a prompt that was read; nothing is decoded."""

    budgets: list[int]
    budget_history: list[list[int]]
    mask: np.ndarray
    """Boolean (layers, heads, positions), sliding-window layers included."""
    kept_fraction: float
    kv_bytes: int
    """Bytes the kept keys and values would take."""


@torch.inference_mode()
def preview(method: CompressionMethod, prefill: Prefill, length: int | None = None) -> Preview:
    """A method's choice over a prefill, as its run would record it; the prefill recalls the
    attention it took, so that the next choice is quicker.

    Args:
        length: tokens of the whole prompt, where a question follows what was read.

    Raises:
        ValueError: the prefill did not record what the method reads, or the model's cache cannot
            hold such a choice.
    """
    require_choosable(prefill, method.parameters)
    if method.needs_mass and prefill.layers[0].mass is None:
        raise ValueError(
            f"{method.name} needs the attention of all tokens, and none was recorded; "
            "prefill with mass=True"
        )
    length = prefill.length if length is None else length
    retention = method.select(prefill.recalling)
    chosen = retained_mask(retention, length, max(keys.shape[0] for keys in prefill.keys))
    held = {
        place: min(length, other.window - 1) if other.window else other.held
        for place, other in sorted(prefill.others.items())
    }
    positions = [sum(len(head) for head in kept) for kept in retention.indices]
    later = length - prefill.length
    compressed = sum(
        (number + later * len(kept))
        * max(1, keys.shape[0] // len(kept))
        * (keys.shape[2] * keys.element_size() + values.shape[2] * values.element_size())
        for number, kept, keys, values in zip(
            positions, retention.indices, prefill.keys, prefill.values, strict=True
        )
    )
    others = sum(
        other.nbytes // other.held * held[place] if other.held else other.nbytes
        for place, other in prefill.others.items()
    )
    return Preview(
        budgets=in_place_order(retention.budgets, prefill.places, held),
        budget_history=[list(update) for update in retention.budget_history],
        mask=of_all_layers(chosen, prefill.places, held),
        kept_fraction=share_kept(retention, length),
        kv_bytes=compressed + others,
    )


@torch.inference_mode()
def select(method: CompressionMethod, prefill: Prefill) -> Retention:
    """A method's choice over a prefill."""
    return method.select(prefill.layers)


def share_kept(retention: Retention, length: int) -> float:
    """Share of a prompt of `length` tokens kept in the compressed layers, what was fed after the
    compression included."""
    heads = sum(len(kept) for kept in retention.indices)
    later = length - retention.prompt_length
    kept = sum(len(head) + later for layer in retention.indices for head in layer)
    return kept / (heads * length)


def retained_mask(retention: Retention, length: int, least_heads: int = 1) -> np.ndarray:
    """Boolean (compressed layers, heads, length); what was fed after the compression is kept.

    A layer that stores fewer heads than others repeats them, as query heads would read them.
    """
    heads = max(least_heads, *(len(kept) for kept in retention.indices))
    mask = np.zeros((len(retention.indices), heads, length), bool)
    mask[:, :, retention.prompt_length :] = True
    # All in one transfer: each makes the host wait for the device.
    rows = [row for kept in retention.indices for row in kept]
    places = torch.cat([row.to(rows[0].device) for row in rows]).cpu().numpy()
    held = iter(np.split(places, np.cumsum([len(row) for row in rows])[:-1]))
    for layer, kept in enumerate(retention.indices):
        own = [next(held) for _ in kept]
        for head in range(heads):
            mask[layer, head, own[head * len(own) // heads]] = True
    return mask


def held_mask(cache: KVCache, places: Sequence[int], seen: int, length: int) -> np.ndarray:
    """Boolean (layers, heads, length): what a cache holds of the `seen` positions fed to it; those
    after them are held."""
    rows = [cache.layers[place].rows_held()[0][1] for place in places]
    retention = Retention(indices=tuple(rows), prompt_length=seen)
    layers = enumerate(cache.layers)
    keys = {place: getattr(layer, "keys", None) for place, layer in layers if place not in places}
    held = {place: 0 if tensor is None else tensor.shape[2] for place, tensor in keys.items()}
    mask = retained_mask(retention, length)
    return of_all_layers(mask, places, {place: length - seen + held[place] for place in held})


def of_all_layers(mask: np.ndarray, places: Sequence[int], held: Mapping[int, int]) -> np.ndarray:
    """The mask of all layers, given where those of `mask` stand and how many of the last positions
    each of the others holds."""
    _, heads, length = mask.shape
    everything = np.zeros((len(mask) + len(held), heads, length), bool)
    everything[list(places)] = mask
    for place, number in held.items():
        everything[place, :, length - number :] = True
    return everything


def in_place_order(
    budgets: Sequence[int], places: Sequence[int], held: Mapping[int, int]
) -> list[int]:
    """The budgets of all layers, as `of_all_layers`."""
    known = {**dict(zip(places, budgets, strict=True)), **held}
    return [known[place] for place in sorted(known)]


@torch.inference_mode()
def layer_scores(method: CompressionMethod, prefill: Prefill, length: int) -> np.ndarray | None:
    """Scores averaged over heads, each layer scaled to 0..255, uint8 (layers, length).

    The window and what follows it read 255, layers that no method compresses 0. None for a
    method without scores and for a prompt that is not longer than the window.
    """
    if not isinstance(method, ScoredMethod) or prefill.length <= method.window_size:
        return None
    table = np.zeros((len(prefill.layers) + len(prefill.others), length), np.uint8)
    for place, layer in zip(prefill.compressed_layers, prefill.recalling, strict=True):
        scores: Tensor = method.score(layer).mean(dim=0)
        scaled = scores / scores.max().clamp_min(torch.finfo(torch.float32).tiny) * 255
        table[place, : scores.shape[0]] = scaled.round().to(torch.uint8).cpu().numpy()
        table[place, scores.shape[0] :] = 255
    return table
