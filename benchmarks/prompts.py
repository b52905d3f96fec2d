"""What the benchmarks run: prompts of a given length, the papers' methods, the embedded model,
decoding steps."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import dynamickv as dkv
from dynamickv.answer import select
from dynamickv.cache import prune
from dynamickv.decoding.decode import decode
from dynamickv.models import KNOWN_MODELS, embedded_file
from dynamickv.models.conversion import converted
from dynamickv.reading.prompt import encode_prompt
from dynamickv.records import EncodedPrompt, Prefill

EXAMPLES = Path(__file__).parent.parent / "assets" / "examples"
QUESTION = "What is the most important fact in this text?"
SIX = ("FullKV", "StreamingLLM", "H2O", "SnapKV", "PyramidKV", "DynamicKV")
"""FullKV and the methods of the papers."""
STEPS = 24
"""Decoding steps whose median is a round."""


def example_text() -> str:
    """All example documents, one after the other."""
    return "\n\n".join(path.read_text("utf-8") for path in sorted(EXAMPLES.glob("*.txt")))


def document_of(llm: dkv.LoadedModel, length: int) -> str:
    """A document that makes a prompt of about `length` tokens."""
    prompt = prompt_of(llm, length)
    start, end = prompt.document_characters
    return prompt.text[start:end]


def prompt_of(llm: dkv.LoadedModel, length: int) -> EncodedPrompt:
    """A prompt of exactly or a few tokens less than `length`: example texts, cut in the middle."""
    text = example_text()
    while True:
        whole = encode_prompt(llm.tokenizer, text, QUESTION, limit=length, truncate=True)
        if whole.truncated:
            return whole
        text = f"{text}\n\n{text}"


def endless(llm: dkv.LoadedModel) -> dkv.LoadedModel:
    """The same model without a token that ends an answer, so that all answers are equally long."""
    return replace(llm, stop_ids=frozenset())


def step_seconds(llm: dkv.LoadedModel, method: dkv.CompressionMethod, read: Prefill) -> float:
    """Median seconds of a decoding step."""
    cache = prune(read, select(method, read), STEPS)
    steps = list(decode(endless(llm), cache, read.logits, read.length, STEPS))
    return statistics.median(step.seconds for step in steps[1:])


def safetensors_folder() -> Path:
    """The embedded model converted, for engines that do not read its file.

    Raises:
        SystemExit: it is not installed.
    """
    file = embedded_file(KNOWN_MODELS[dkv.DEFAULT_MODEL])
    if file is None:
        raise SystemExit("the embedded model is not installed; run make setup")
    return converted(file)
