"""A GPU's model with Liger's kernels between its products is observed, compressed and decoded like
the one without."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama import modeling_llama

import dynamickv as dkv
from tests.engine.tiny import DOCUMENT, QUESTION, tiny_llm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
METHODS = [dkv.FullKV(), dkv.SnapKV(capacity=24), dkv.DynamicKV(capacity=24)]


def answered(llm: dkv.LoadedModel) -> dkv.Trace:
    return dkv.compare(llm, DOCUMENT, QUESTION, methods=METHODS, max_new_tokens=16)


def generated(llm: dkv.LoadedModel) -> list[int]:
    ids = llm.tokenizer(DOCUMENT, return_tensors="pt").input_ids.cuda()
    with dkv.compress(llm.model, METHODS[-1]) as cache:
        output = llm.model.generate(ids, past_key_values=cache, max_new_tokens=16, do_sample=False)
    return output[0].tolist()


def test_what_is_kept_and_answered_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    liger = pytest.importorskip("liger_kernel.transformers", reason="needs liger-kernel")
    llm = tiny_llm()
    llm.model.cuda()
    before, answer = answered(llm), generated(llm)
    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    liger.apply_liger_kernel_to_llama(fused_linear_cross_entropy=False, model=llm.model)
    after = answered(llm)
    assert generated(llm) == answer
    for one, other in zip(before.runs, after.runs, strict=True):
        assert one.token_ids == other.token_ids
        assert (one.budgets, one.retained) == (other.budgets, other.retained)
