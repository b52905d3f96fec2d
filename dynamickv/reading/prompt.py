"""Document and question -> token ids, with the exact place of both in tokens and in characters.

The document and the question are data: a special token spelled out in them is read as plain text,
never as markup. Knows tokenizers and nothing else of a model.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from dynamickv.reading.template import message_parts, template_parts
from dynamickv.records import EncodedPrompt

log = logging.getLogger(__name__)


def encode_prompt(
    tokenizer: Any,
    document: str,
    question: str,
    *,
    limit: int,
    answer_tokens: int = 0,
    truncate: bool = False,
    chat_template: bool = True,
) -> EncodedPrompt:
    """Lay document and question out in the model's chat template and tokenize them.

    Args:
        tokenizer: a fast transformers tokenizer.
        limit: what the model reads, prompt and answer together, in tokens.
        answer_tokens: how long the answer may become. A cut leaves room for it; without one, a
            prompt that leaves less room is read, and the log says so.
        truncate: cut the middle out of a document that is too long, keeping its first and last
            parts as LongBench does, instead of refusing it.
        chat_template: False feeds document and question as plain text, as LongBench does: the
            tokens are those of `tokenizer(text)`, with the special tokens that it puts around a
            text, such as BOS, which stand at no character.

    Raises:
        ValueError: if document or question hold no text, or the prompt is longer than `limit`.
    """
    require_text("document", document)
    require_text("question", question)
    document, question = _valid_text(document), _valid_text(question)
    parts = template_parts(tokenizer, chat_template)
    encoded = _encode(tokenizer, parts, document, question, chat_template)
    if encoded.length + answer_tokens <= limit:
        return encoded
    if truncate:
        return _truncated(tokenizer, parts, encoded, document, question, limit, answer_tokens)
    if encoded.length > limit:
        raise ValueError(
            f"the prompt has {encoded.length:,} tokens and this model reads {limit:,}; "
            "shorten the document or allow cutting out its middle"
        )
    # The last token of an answer is never read.
    room = limit - encoded.length + 1
    if room < answer_tokens:
        log.warning(
            "The prompt has %s tokens and this model reads %s, so answers end after %d of %d "
            "tokens; shorten the document or allow cutting out its middle.",
            f"{encoded.length:,}",
            f"{limit:,}",
            room,
            answer_tokens,
        )
    return encoded


def encode_text(
    tokenizer: Any, text: str, *, limit: int | None = None, chat_template: bool = False
) -> EncodedPrompt:
    """Tokenize a prompt that is laid out already, question included, such as a benchmark's.

    Args:
        tokenizer: a fast transformers tokenizer.
        limit: a text of more tokens keeps its first and last limit // 2, which are decoded, joined
            and tokenized again, as LongBench does; the result may have a few tokens more or less.
        chat_template: True makes the text the user's message in the model's chat template, which
            comes on top of `limit`.

    Raises:
        ValueError: if there is no text, or `limit` leaves nothing of it.
    """
    require_text("prompt", text)
    text = _valid_text(text)
    whole = _encode(tokenizer, ("", "", ""), text, "", False)
    shorter = text
    if limit is not None and whole.length > limit:
        if limit < 2:
            raise ValueError(f"a prompt needs at least 2 tokens to keep both ends, got {limit}")
        halves = whole.token_ids[: limit // 2], whole.token_ids[-(limit // 2) :]
        shorter = "".join(tokenizer.decode(half, skip_special_tokens=True) for half in halves)
    before, after = message_parts(tokenizer) if chat_template else ("", "")
    encoded = _encode(tokenizer, (before, "", after), shorter, "", bool(before or after))
    cut = max(whole.length - limit, 0) if limit is not None else 0
    # The question lies somewhere in the text; an empty one at its end says that it was read.
    return replace(
        encoded,
        question_span=(encoded.length, encoded.length),
        original_length=encoded.length + cut,
    )


def require_text(name: str, text: object) -> None:
    """Raise ValueError unless `text` is a string with something in it."""
    if not isinstance(text, str):
        raise ValueError(f"the {name} must be text, got {type(text).__name__}; enter some text")
    if not text.strip():
        raise ValueError(f"the {name} is empty; enter some text")


def require_longer_document(document: str, question: str) -> None:
    """Guard people against having swapped the two fields.

    Raises:
        ValueError: if the question is longer than the document.
    """
    if document.strip() and len(question) > len(document):
        raise ValueError(
            f"the question has {len(question):,} characters and the document {len(document):,}; "
            "put the long text into the document and the short one into the question"
        )


def _truncated(
    tokenizer: Any,
    parts: tuple[str, str, str],
    whole: EncodedPrompt,
    document: str,
    question: str,
    limit: int,
    answer_tokens: int,
) -> EncodedPrompt:
    """Keep the first and last halves of the document that fit; joined text may tokenize longer, so
    try again."""
    first, last = whole.document_span
    start = whole.document_characters[0]
    most = limit - answer_tokens
    room = most - (whole.length - (last - first))
    while room > 0:
        head_end = whole.offsets[first + (room + 1) // 2 - 1][1] - start
        tail_start = whole.offsets[last - room // 2][0] - start if room > 1 else len(document)
        shorter = _encode(
            tokenizer,
            parts,
            document[:head_end] + document[tail_start:],
            question,
            whole.chat_template,
        )
        if shorter.length <= most:
            return replace(shorter, original_length=whole.length)
        room -= shorter.length - most
    answer = f", with an answer of {answer_tokens:,} tokens" if answer_tokens else ""
    raise ValueError(
        f"the question and the template alone take {whole.length - (last - first):,} tokens "
        f"and this model reads {limit:,}{answer}; shorten the question"
        + (" or the answer" if answer_tokens else "")
    )


def _encode(
    tokenizer: Any,
    parts: tuple[str, str, str],
    document: str,
    question: str,
    chat_template: bool,
) -> EncodedPrompt:
    before, between, after = parts
    text = before + document + between + question + after
    document_start = len(before)
    document_end = document_start + len(document)
    question_start = document_end + len(between)
    question_end = question_start + len(question)
    token_ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    for start, end, plain in _segments(
        tokenizer, text, document, question, len(before), question_end
    ):
        # Fast tokenizers keep the flag for later calls, so it is always given.
        piece = tokenizer(
            text[start:end],
            add_special_tokens=False,
            return_offsets_mapping=True,
            split_special_tokens=plain,
        )
        token_ids += piece["input_ids"]
        offsets += [
            (start + left, start + right) for left, right in _untrimmed(piece["offset_mapping"])
        ]
    if not chat_template:
        first, last = _around(tokenizer)
        token_ids = [*first, *token_ids, *last]
        end = len(text)
        offsets = [(0, 0)] * len(first) + offsets + [(end, end)] * len(last)
    return EncodedPrompt(
        token_ids=token_ids,
        text=text,
        offsets=offsets,
        document_span=_touching(offsets, document_start, document_end),
        document_characters=(document_start, document_end),
        question_span=_touching(offsets, question_start, question_end),
        question=question,
        original_length=len(token_ids),
        chat_template=chat_template,
    )


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Special tokens that a tokenizer puts before and after a text."""
    # The flag is given because fast tokenizers keep it from earlier calls.
    encoded = tokenizer("a", return_special_tokens_mask=True, split_special_tokens=False)
    token_ids, mask = encoded["input_ids"], encoded["special_tokens_mask"]
    text = [index for index, special in enumerate(mask) if not special]
    return token_ids[: text[0]], token_ids[text[-1] + 1 :]


def _segments(
    tokenizer: Any, text: str, document: str, question: str, start: int, end: int
) -> list[tuple[int, int, bool]]:
    """[start, end, read special tokens as plain text) pieces of the prompt.

    The prompt is tokenized whole, as a chat would be, unless the user's text spells a special
    token: then the user's part is read apart, and its special tokens as plain text.
    """
    special = [token for token in tokenizer.get_added_vocab() if token]
    if not any(token in document or token in question for token in special):
        return [(0, len(text), False)]
    return [
        piece
        for piece in ((0, start, False), (start, end, True), (end, len(text), False))
        if piece[0] < piece[1]
    ]


def _untrimmed(offsets: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Give tokens the leading spaces back that some tokenizers leave out of their offsets."""
    whole: list[tuple[int, int]] = []
    covered = 0
    for (left, right), (following, _) in zip(offsets, [*offsets[1:], (0, 0)], strict=True):
        left = min(left, covered)
        whole.append((left, max(right, following if left == right else right)))
        covered = max(covered, whole[-1][1])
    return whole


def _touching(offsets: list[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """[first, last) token that shares a character with text[start:end]."""
    touching = [
        index for index, (left, right) in enumerate(offsets) if left < end and right > start
    ]
    return (touching[0], touching[-1] + 1) if touching else (0, 0)


def _valid_text(text: str) -> str:
    """Lone surrogates cannot be tokenized or saved; everything else stays as it is."""
    return (
        text.encode("utf-8", "replace").decode("utf-8")
        if any("\ud800" <= c <= "\udfff" for c in text)
        else text
    )
