"""transformers' generate, timed token by token."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

import dynamickv as dkv
from benchmarks.gpu.timing import Mark


class Beats(StoppingCriteria):
    """Marks every token of `generate`; stops nothing."""

    def __init__(self) -> None:
        self.marks: list[Mark] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.marks.append(Mark())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@torch.inference_mode()
def generate_seconds(llm: dkv.LoadedModel, ids: Tensor, tokens: int) -> list[float]:
    """Seconds of each token, but for the first five, with its own cache and the prompt excluded."""
    backend = llm.attention
    llm.model.set_attn_implementation(backend)
    cache = DynamicCache()
    llm.model(ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
    beats = Beats()
    llm.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([beats]),
    )
    return [later.since(earlier) for earlier, later in pairwise(beats.marks)][4:]
