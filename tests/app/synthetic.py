"""A synthetic run record, for tests of the page alone: invented retention over an invented text, no
model involved.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from dynamickv.record.trace import Agreement, Aligned, ModelInfo, Prompt, Retained, Run, Trace

HEADS, HEAD_DIM = 3, 64
WORDS = [
    "the",
    "river",
    "rose",
    "again",
    "after",
    "midnight",
    "and",
    "the",
    "old",
    "bridge",
    "held",
    "while",
    "crews",
    "carried",
    "sand",
    "along",
    "its",
    "northern",
    "bank",
]
WORDS_KEPT = Aligned(
    utf16_spans=[[1, 4], [5, 13], [14, 18], [19, 22], [23, 33], [33, 34]],
    token_spans=[[at, at + 1] for at in range(6)],
    probabilities=[0.9, 0.01, 0.8, 0.8, 0.9, 0.9],
    probabilities_full=[0.9, 0.95, 0.8, 0.8, 0.9, 0.8],
    instead=["", " old", "", "", "", ""],
    instead_probabilities=[0.0, 0.7, 0.0, 0.0, 0.0, 0.0],
    surviving=0.835,
    loss=1,
)
"""FullKV's answer under the other caches: "northern" is lost."""
BEFORE, AFTER = (
    "<|im_start|>user\n",
    "\n\nWhich bank was reinforced?<|im_end|>\n<|im_start|>assistant\n",
)


def synthetic_trace(
    *,
    tokens: int = 1200,
    layers: int = 30,
    capacity: int = 96,
    window: int = 16,
    methods: tuple[str, ...] = ("FullKV", "DynamicKV"),
    document: str | None = None,
) -> Trace:
    """A record of the given size; the same arguments always give the same record."""
    rng = random.Random(7)
    document = make_document(rng, tokens) if document is None else document
    text = BEFORE + document + AFTER
    pieces = split_tokens(text)
    offsets = offsets_of(pieces)
    length = len(pieces)
    start, end = utf16(BEFORE), utf16(BEFORE) + utf16(document)
    document_span = [sum(o[1] <= start for o in offsets), sum(o[0] < end for o in offsets)]
    model = ModelInfo(
        name="synthetic-model",
        revision="none",
        num_layers=layers,
        num_query_heads=9,
        num_kv_heads=HEADS,
        head_dim=HEAD_DIM,
        dtype="float32",
        device="cpu",
        attention="sdpa",
        max_positions=8192,
        precision="exact",
    )
    prompt = Prompt(
        length=length,
        text=text,
        text_utf16_offsets=offsets,
        document_span=document_span,
        document_utf16_span=[start, end],
        question_span=[document_span[1], length],
        question="Which bank was reinforced?",
        question_aware=True,
        truncated=False,
        original_length=length,
    )
    runs = [make_run(name, length, layers, capacity, window) for name in methods]
    return Trace(
        created="2026-11-23T19:30:00Z",
        versions={"dynamickv": "0.1.0"},
        model=model,
        prompt=prompt,
        prefill_seconds=2.5,
        runs=runs,
    )


def make_run(method: str, length: int, layers: int, capacity: int, window: int) -> Run:
    """Invented retention: everything for FullKV, a smooth hump of budgets otherwise."""
    rng = np.random.default_rng(11 if method == "DynamicKV" else len(method))
    keeps_all = method == "FullKV" or length <= capacity
    mask = np.ones((layers, HEADS, length), dtype=bool)
    budgets = [length] * layers
    history: list[list[int]] = []
    if not keeps_all:
        shape = 0.4 + np.exp(-(((np.arange(layers) - layers * 0.45) / (layers * 0.2)) ** 2))
        prefix = np.floor((capacity - window) * layers * shape / shape.sum()).astype(int)
        budgets = [int(min(p, length - window)) + window for p in prefix]
        for seen in [*range(4, layers, 4), layers]:
            part = np.floor(
                (capacity - window) * layers * shape[:seen] / shape[:seen].sum()
            ).astype(int)
            history.append([int(p) for p in part])
        mask[:] = False
        weight = np.convolve(rng.random(length - window) ** 6, np.ones(7) / 7, "same")
        for layer in range(layers):
            for head in range(HEADS):
                noisy = weight + 0.15 * rng.random(length - window)
                mask[layer, head, np.argsort(-noisy)[: budgets[layer] - window]] = True
        mask[:, :, length - window :] = True
    answer = (
        [" The", " northern", " bank", " was", " reinforced", "."]
        if keeps_all
        else [" The", " old", " bridge", "."]
    )
    full_bytes = 2 * layers * HEADS * length * HEAD_DIM * 4
    return Run(
        method=method,
        parameters={} if method == "FullKV" else {"capacity": capacity, "window_size": window},
        answer="".join(answer),
        pieces=answer,
        token_ids=list(range(len(answer))),
        logprobs=[-0.2] * len(answer),
        finish_reason="stop",
        budgets=budgets,
        budget_history=history if method == "DynamicKV" else [],
        retained=Retained.pack(mask),
        kv_bytes=int(mask.sum()) * HEAD_DIM * 2 * 4,
        kv_bytes_full=full_bytes,
        kept_fraction=float(mask.mean()),
        score_seconds=0.03,
        prune_seconds=0.01,
        decode_seconds=[0.0] + [0.05] * (len(answer) - 1),
        agreement=Agreement(first_divergence=None, token_match=1.0, rouge_l=1.0)
        if keeps_all
        else Agreement(first_divergence=1, token_match=0.25, rouge_l=0.4),
        aligned=None if keeps_all else WORDS_KEPT,
        erased=int((~mask.any(axis=(0, 1))).sum()),
    )


def make_document(rng: random.Random, tokens: int) -> str:
    """Invented prose with paragraphs."""
    words = []
    for index in range(tokens // 2):
        words.append(
            rng.choice(WORDS)
            + ("." if index % 13 == 12 else "")
            + ("\n\n" if index % 78 == 77 else " ")
        )
    return "".join(words)


def split_tokens(text: str) -> list[str]:
    """Tokens of up to four characters: not a tokenizer, only something with offsets."""
    return [text[i : i + 4] for i in range(0, len(text), 4)]


def offsets_of(pieces: list[str]) -> list[list[int]]:
    """UTF-16 offsets of consecutive pieces."""
    offsets, at = [], 0
    for piece in pieces:
        offsets.append([at, at + utf16(piece)])
        at += utf16(piece)
    return offsets


def utf16(text: str) -> int:
    """Length in UTF-16 units."""
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


def synthetic_dict(**options: Any) -> dict[str, Any]:
    """The same record as JSON-ready data."""
    return synthetic_trace(**options).to_dict()
