"""Teacher forcing: what a compressed cache would say next at the words of a given answer.

One pass over the answer, so that caches are compared word by word on the same text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dynamickv.cache import prune
from dynamickv.decoding.decode import follow
from dynamickv.methods import CompressionMethod
from dynamickv.models import LoadedModel
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
    if not answer:
        raise ValueError("an answer of no tokens cannot be fed; give at least one")
    if not prefill.question_aware:
        raise ValueError("this prefill holds a document alone; prefill it with the question")
    room = llm.geometry.max_positions - prefill.length
    fed = list(answer)[:room]
    cache = prune(prefill, method.select(prefill.layers), len(fed))
    logits = torch.cat(list(follow(llm, cache, fed, prefill.length))).float()
    return logits.log_softmax(-1)


def divergence(full: Tensor, other: Tensor) -> Tensor:
    """KL divergence of `other` from `full`, both log-probabilities (tokens, vocabulary): (tokens,),
    in nats, never below 0."""
    return (full.exp() * (full - other)).sum(-1).clamp_min(0)
