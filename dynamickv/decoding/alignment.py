"""Hold every run's cache against FullKV's answer, word by word.

FullKV's answer is fed to the full cache and to each run's (teacher forcing), one pass for each;
how probable its tokens are there becomes `record.aligned.Aligned`, and where a run's own answer
leaves FullKV's, both tokens' probabilities become its `Divergence`: up to there both answers are
the same words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dynamickv.cache import KVCache, prune
from dynamickv.decoding.decode import extend, follow
from dynamickv.decoding.forgetting import Forgetting
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
    (2,843 tokens, six methods, answers of up to 64): 4.5 % of the run.

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
    whole = along(
        llm,
        prefill,
        prompt,
        lambda room: (prune(prefill, every, room), None),
        full.token_ids,
        pairs,
    )
    for index in others:
        pair = {index: pairs[index]} if index in pairs else {}
        own = along(llm, prefill, prompt, caches[index - first], full.token_ids, pair)
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

    forced: Forced
    asked: dict[int, list[float]] = field(default_factory=dict)


@torch.inference_mode()
def along(
    llm: LoadedModel,
    prefill: Prefill,
    prompt: EncodedPrompt,
    make_cache: MakeCache,
    answer: Sequence[int],
    asked: Mapping[int, tuple[int, list[int]]],
) -> Pass:
    """One pass of a cache over an answer.

    Args:
        asked: (place in the answer, token ids) whose probabilities are wanted too, by any key.
    """
    later = prompt.token_ids[prefill.length :]
    cache, forgetting = make_cache(len(later) + len(answer))
    start = prefill.logits
    if later:
        start = extend(llm, cache, later, prefill.length, forgetting)
    made = Pass(Forced(probabilities=[], likeliest=[], likeliest_probabilities=[]))
    _take(made, start[None], answer, asked)
    for logits in follow(llm, cache, answer[:-1], prompt.length, forgetting=forgetting):
        _take(made, logits, answer, asked)
    if forgetting is not None:
        forgetting.end()
    return made


def _take(
    made: Pass, logits: Tensor, answer: Sequence[int], asked: Mapping[int, tuple[int, list[int]]]
) -> None:
    """Add what some places' logits, (places, vocabulary), say."""
    done = len(made.forced.likeliest)
    shares = logits.float().softmax(dim=-1)
    said = torch.tensor(answer[done : done + len(shares)], device=shares.device)
    best = shares.max(dim=-1)
    made.forced.probabilities.extend(shares.gather(1, said[:, None])[:, 0].tolist())
    made.forced.likeliest.extend(best.indices.tolist())
    made.forced.likeliest_probabilities.extend(best.values.tolist())
    for key, (place, tokens) in asked.items():
        if done <= place < done + len(shares):
            made.asked[key] = shares[place - done, tokens].tolist()
