"""Hold every run's cache against FullKV's answer, word by word.

FullKV's answer is fed to the full cache and to each run's (teacher forcing), one pass for each, or
one for all of a model read from packed weights; how probable its tokens are there becomes
`record.aligned.Aligned`, and where a run's own answer leaves FullKV's, both tokens' probabilities
become its `Divergence`: up to there both answers are the same words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dynamickv.cache import KVCache, prune
from dynamickv.decoding.decode import extend, follow
from dynamickv.decoding.forgetting import Forgetting
from dynamickv.fast.decoder import packed_throughout
from dynamickv.memory import free_host_memory
from dynamickv.methods import FullKV
from dynamickv.models import LoadedModel
from dynamickv.record.agreement import yardstick_of
from dynamickv.record.aligned import Forced, aligned
from dynamickv.record.trace import Divergence, Run
from dynamickv.records import EncodedPrompt, Prefill

Growing = tuple[KVCache, Forgetting | None]
"""A cache, and what goes on choosing in it."""
MakeCache = Callable[[int], Growing]
"""One with room for so many more tokens."""


def with_alignment(
    llm: LoadedModel,
    prefill: Prefill,
    prompt: EncodedPrompt,
    caches: Sequence[MakeCache],
    runs: Sequence[Run],
) -> list[Run]:
    """Add to the last runs how FullKV's answer fares under their caches.

    Decoding itself is not touched. Measured with SmolLM2-135M on a CPU
    (2,843 tokens, six methods, answers of up to 64): 4.5 % of the run in precision "exact".

    Args:
        caches: each of the last runs' cache, anew.
        runs: with their agreement, FullKV among them; without it nothing is added.
    """
    made = list(runs)
    full = yardstick_of(runs)
    first = len(runs) - len(caches)
    others = [index for index in range(first, len(runs)) if runs[index] is not full]
    if full is None or not full.token_ids or not others:
        return made
    places = {
        index: place for index in others if (place := _parting(runs[index], full)) is not None
    }
    pairs = {
        index: (place, [runs[index].token_ids[place], full.token_ids[place]])
        for index, place in places.items()
    }
    every = FullKV().select(prefill.layers)
    made_of: list[MakeCache] = [lambda room: (prune(prefill, every, room), None)]
    made_of += [caches[index - first] for index in others]
    asked = [pairs, *({key: pairs[key]} if key in pairs else {} for key in others)]
    whole, *rest = _passes(llm, prefill, prompt, made_of, full.token_ids, asked)
    for index, own in zip(others, rest, strict=True):
        texts = [
            str(llm.tokenizer.decode([token], clean_up_tokenization_spaces=False))
            for token in own.forced.likeliest
        ]
        words = aligned(full.pieces, full.token_ids, whole.forced, own.forced, texts)
        agreement = runs[index].agreement
        if index in pairs and agreement is not None:
            at, token_ids = pairs[index]
            parted = Divergence(
                token_ids=token_ids,
                pieces=[runs[index].pieces[at], full.pieces[at]],
                probabilities=own.asked[index],
                probabilities_full=whole.asked[index],
            )
            agreement = replace(agreement, divergence=parted)
        made[index] = replace(runs[index], aligned=words, agreement=agreement)
    return made


def _parting(run: Run, full: Run) -> int | None:
    """The token in which a run leaves FullKV's answer, where both have one there."""
    at = run.agreement.first_divergence if run.agreement else None
    return None if at is None or at >= min(len(run.token_ids), len(full.token_ids)) else at


@dataclass(slots=True)
class Pass:
    """What one cache says along an answer."""

    forced: Forced = field(
        default_factory=lambda: Forced(probabilities=[], likeliest=[], likeliest_probabilities=[])
    )
    asked: dict[int, list[float]] = field(default_factory=dict)


Asked = Mapping[int, tuple[int, list[int]]]
"""(place in an answer, token ids) whose probabilities are wanted too, by any key."""


def _passes(
    llm: LoadedModel,
    prefill: Prefill,
    prompt: EncodedPrompt,
    caches: Sequence[MakeCache],
    answer: Sequence[int],
    asked: Sequence[Asked],
) -> list[Pass]:
    """`along` for several caches, in one pass where the model can."""
    both = list(zip(caches, asked, strict=True))
    passes: list[Pass | None] = [None] * len(both)
    packed = llm.packed if packed_throughout(llm) else None
    # All are in memory at once then.
    if packed is not None and free_host_memory() > 2 * len(both) * prefill.whole_bytes:
        # Numba takes a second to load.
        from dynamickv.decoding.side_by_side import follow_all

        begun: dict[int, _Begun] = {}
        for index, (make, own) in enumerate(both):
            one = _begin(llm, prefill, prompt, make, answer, own)
            if one.forgetting is None and one.cache.plain:
                begun[index] = one
            elif one.forgetting is not None:
                one.forgetting.end()
        shared = list(begun.values())
        grown = [one.cache for one in shared]
        for number, logits in follow_all(llm, packed, grown, answer[:-1], prompt.length):
            shared[number].take(logits)
        for index, one in begun.items():
            passes[index] = one.made
    return [
        along(llm, prefill, prompt, make, answer, own) if done is None else done
        for (make, own), done in zip(both, passes, strict=True)
    ]


def along(
    llm: LoadedModel,
    prefill: Prefill,
    prompt: EncodedPrompt,
    make_cache: MakeCache,
    answer: Sequence[int],
    asked: Asked,
) -> Pass:
    """One pass of a cache over an answer."""
    begun = _begin(llm, prefill, prompt, make_cache, answer, asked)
    return begun.follow(llm, prompt.length)


@dataclass(slots=True, eq=False)
class _Begun:
    """A cache before an answer, and what it says of the answer so far."""

    cache: KVCache
    forgetting: Forgetting | None
    answer: Sequence[int]
    asked: Asked
    made: Pass = field(default_factory=Pass)

    def follow(self, llm: LoadedModel, position: int) -> Pass:
        """Feed the whole answer from its true position on."""
        fed = self.answer[:-1]
        for logits in follow(llm, self.cache, fed, position, forgetting=self.forgetting):
            self.take(logits)
        if self.forgetting is not None:
            self.forgetting.end()
        return self.made

    @torch.inference_mode()
    def take(self, logits: Tensor) -> None:
        """Add what some places' logits, (places, vocabulary), say."""
        forced = self.made.forced
        done = len(forced.likeliest)
        shares = logits.float().softmax(dim=-1)
        said = torch.tensor(self.answer[done : done + len(shares)], device=shares.device)
        best = shares.max(dim=-1)
        forced.probabilities.extend(shares.gather(1, said[:, None])[:, 0].tolist())
        forced.likeliest.extend(best.indices.tolist())
        forced.likeliest_probabilities.extend(best.values.tolist())
        for key, (place, tokens) in self.asked.items():
            if done <= place < done + len(shares):
                self.made.asked[key] = shares[place - done, tokens].tolist()


@torch.inference_mode()
def _begin(
    llm: LoadedModel,
    prefill: Prefill,
    prompt: EncodedPrompt,
    make_cache: MakeCache,
    answer: Sequence[int],
    asked: Asked,
) -> _Begun:
    """A cache that was fed the whole prompt, with room for the answer."""
    later = prompt.token_ids[prefill.length :]
    cache, forgetting = make_cache(len(later) + len(answer))
    start = prefill.logits
    if later:
        start = extend(llm, cache, later, prefill.length, forgetting)
    begun = _Begun(cache, forgetting, answer, asked)
    begun.take(start[None])
    return begun
