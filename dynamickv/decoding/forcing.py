"""Teacher forcing: what a compressed cache would say next at the words of a given answer.

One pass over the answer, so that caches are compared word by word on the same text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dynamickv.cache import prune
from dynamickv.decoding.alignment import Growing, along
from dynamickv.decoding.decode import follow
from dynamickv.decoding.forgetting import OnChoice, forgetting_of
from dynamickv.methods import CompressionMethod
from dynamickv.methods.decoding import Decoding
from dynamickv.models import LoadedModel
from dynamickv.record.aligned import Forced
from dynamickv.records import Prefill


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
    _require_answer(prefill, answer)
    room = llm.geometry.max_positions - prefill.length
    fed = list(answer)[:room]
    cache = prune(prefill, method.select(prefill.layers), len(fed))
    logits = torch.cat(list(follow(llm, cache, fed, prefill.length))).float()
    return logits.log_softmax(-1)


def forced(
    llm: LoadedModel,
    prefill: Prefill,
    method: CompressionMethod,
    answer: Sequence[int],
    decoding: Decoding | None = None,
    on_choice: OnChoice | None = None,
) -> Forced:
    """How probable each of the answer's tokens is and which token is likeliest in its place, the
    cache being that method's, without keeping every token's logits.

    Args:
        decoding: the method chooses again while the answer is fed.
        on_choice: called after each such choice.

    Raises:
        ValueError: as `forced_logits`, or a method that cannot choose again.
    """
    _require_answer(prefill, answer)
    chosen = method if decoding is None else decoding.of_prompt(method)

    def growing(room: int) -> Growing:
        kept = chosen.select(prefill.layers)
        cache = prune(prefill, kept, room if decoding is None else 0)
        return cache, forgetting_of(method, decoding, prefill, cache, on_choice)

    fed = answer[: llm.geometry.max_positions - prefill.length + 1]
    return along(llm, prefill, prefill.prompt, growing, fed, {}).forced


def _require_answer(prefill: Prefill, answer: Sequence[int]) -> None:
    if not answer:
        raise ValueError("an answer of no tokens cannot be fed; give at least one")
    if not prefill.question_aware:
        raise ValueError("this prefill holds a document alone; prefill it with the question")


def divergence(full: Tensor, other: Tensor) -> Tensor:
    """KL divergence of `other` from `full`, both log-probabilities (tokens, vocabulary): (tokens,),
    in nats, never below 0."""
    return (full.exp() * (full - other)).sum(-1).clamp_min(0)
