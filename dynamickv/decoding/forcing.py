"""Teacher forcing: what a compressed cache would say next at every word of a given answer.

One pass over the whole answer, so that caches are compared word by word on the same text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dynamickv.cache import prune
from dynamickv.methods import CompressionMethod
from dynamickv.models import LoadedModel
from dynamickv.reading.observe import observed
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
    positions = torch.arange(prefill.length, prefill.length + len(fed), device=llm.device)
    with observed(llm.model):
        output = llm.model(
            torch.tensor([fed], device=llm.device),
            position_ids=positions[None],
            past_key_values=cache,
            use_cache=True,
        )
    logits: Tensor = output.logits[0].float().log_softmax(-1)
    return logits


def divergence(full: Tensor, other: Tensor) -> Tensor:
    """KL divergence of `other` from `full`, both log-probabilities (tokens, vocabulary): (tokens,),
    in nats, never below 0."""
    return (full.exp() * (full - other)).sum(-1).clamp_min(0)
