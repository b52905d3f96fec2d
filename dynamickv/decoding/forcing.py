"""Teacher forcing: what a compressed cache would say next at the words of a given answer.

One pass over the answer, so that caches are compared word by word on the same text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dynamickv.cache import prune
from dynamickv.decoding.decode import extend
from dynamickv.methods import CompressionMethod, FullKV
from dynamickv.models import LoadedModel
from dynamickv.reading.observe import cache_argument, observed
from dynamickv.record.agreement import yardstick_of
from dynamickv.record.trace import Divergence, Run
from dynamickv.records import EncodedPrompt, Prefill, Retention


@torch.inference_mode()
def forced_logits(
    llm: LoadedModel, prefill: Prefill, method: CompressionMethod, answer: Sequence[int]
) -> Tensor:
    """Next-token log-probabilities after each of the answer's tokens, the cache being that
    method's.

    Args:
        prefill: one that read the question.
        answer: token ids, at least one.

    Returns:
        (len(answer), vocabulary), float32, natural log.

    Raises:
        ValueError: an empty answer, or a prefill of a document alone.
    """
    if not answer:
        raise ValueError("an answer of no tokens cannot be fed; give at least one")
    if not prefill.question_aware:
        raise ValueError("this prefill holds a document alone; prefill it with the question")
    room = llm.geometry.max_positions - prefill.length
    fed = list(answer)[:room]
    cache = prune(prefill, method.select(prefill.layers), len(fed))
    positions = torch.arange(prefill.length, prefill.length + len(fed), device=llm.device)
    with observed(llm.model):
        output = llm.model(
            torch.tensor([fed], device=llm.device),
            position_ids=positions[None],
            **cache_argument(llm.model, cache),
            use_cache=True,
        )
    logits: Tensor = output.logits[0].float().log_softmax(-1)
    return logits


def divergence(full: Tensor, other: Tensor) -> Tensor:
    """KL divergence of `other` from `full`, both log-probabilities (tokens, vocabulary): (tokens,),
    in nats, never below 0."""
    return (full.exp() * (full - other)).sum(-1).clamp_min(0)


@torch.inference_mode()
def probabilities_along(
    llm: LoadedModel,
    prefill: Prefill,
    prompt: EncodedPrompt,
    retention: Retention,
    answer: Sequence[int],
    wanted: Sequence[tuple[int, Sequence[int]]],
) -> list[list[float]]:
    """How probable tokens are along an answer, with the cache of that retention.

    Args:
        answer: token ids that are fed.
        wanted: (how many of them come before, the token ids that are asked for).

    Returns:
        for each of `wanted`, one probability per token id.
    """
    later = prompt.token_ids[prefill.length :]
    fed = [*later, *answer[: max((before for before, _ in wanted), default=0)]]
    cache = prune(prefill, retention, len(fed)) if fed else None
    logits, done = prefill.logits, 0
    shares: dict[int, Tensor] = {}
    for before in sorted({before for before, _ in wanted}):
        end = len(later) + before
        if cache is not None and end > done:
            logits, done = extend(llm, cache, fed[done:end], prefill.length + done), end
        shares[before] = logits.float().softmax(dim=-1)
    return [[float(shares[before][token]) for token in tokens] for before, tokens in wanted]


def with_divergences(
    llm: LoadedModel,
    prefill: Prefill,
    prompt: EncodedPrompt,
    retentions: Sequence[Retention],
    runs: Sequence[Run],
) -> list[Run]:
    """Add how probable both tokens were where the last runs leave FullKV's answer.

    One short pass per cache over the words that both answers share; decoding itself is not touched.

    Args:
        retentions: what each of the last runs kept of the prompt.
        runs: with their agreement, FullKV among them; without it nothing is added.
    """
    made = list(runs)
    yardstick = yardstick_of(runs)
    if yardstick is None:
        return made
    first = len(runs) - len(retentions)
    places: dict[int, int] = {}
    for index, run in enumerate(runs[first:], first):
        at = run.agreement.first_divergence if run.agreement else None
        if at is not None and at < min(len(run.token_ids), len(yardstick.token_ids)):
            places[index] = at
    both = {
        index: [runs[index].token_ids[at], yardstick.token_ids[at]] for index, at in places.items()
    }
    wanted = [(at, both[index]) for index, at in places.items()]
    if not wanted:
        return made
    everything = FullKV().select(prefill.layers)
    full = probabilities_along(llm, prefill, prompt, everything, yardstick.token_ids, wanted)
    for (index, at), whole in zip(places.items(), full, strict=True):
        run, retention = runs[index], retentions[index - first]
        own = probabilities_along(
            llm, prefill, prompt, retention, run.token_ids, [(at, both[index])]
        )
        left = Divergence(
            token_ids=both[index],
            pieces=[run.pieces[at], yardstick.pieces[at]],
            probabilities=own[0],
            probabilities_full=whole,
        )
        assert run.agreement is not None
        made[index] = replace(run, agreement=replace(run.agreement, divergence=left))
    return made
