"""Prompts of a given length, made from the example documents."""

from __future__ import annotations

from pathlib import Path

import dynamickv as dkv
from dynamickv.reading.prompt import encode_prompt
from dynamickv.records import EncodedPrompt

EXAMPLES = Path(__file__).parent.parent / "assets" / "examples"
QUESTION = "What is the most important fact in this text?"


def document_of(llm: dkv.LoadedModel, length: int) -> str:
    """A document that makes a prompt of about `length` tokens."""
    prompt = prompt_of(llm, length)
    start, end = prompt.document_characters
    return prompt.text[start:end]


def prompt_of(llm: dkv.LoadedModel, length: int) -> EncodedPrompt:
    """A prompt of exactly or a few tokens less than `length`: example texts, cut in the middle."""
    texts = [path.read_text("utf-8") for path in sorted(EXAMPLES.glob("*.txt"))]
    text = "\n\n".join(texts)
    while True:
        whole = encode_prompt(llm.tokenizer, text, QUESTION, limit=length, truncate=True)
        if whole.truncated:
            return whole
        text = f"{text}\n\n{text}"
