"""What a model's chat template puts around a document, a question and an answer."""

from __future__ import annotations

from typing import Any

SEPARATOR = "\n\n"
_DOCUMENT, _ANSWER, _QUESTION = (
    f"\ue000{part}\ue000" for part in ("document", "answer", "question")
)


def template_parts(tokenizer: Any, chat_template: bool) -> tuple[str, str, str]:
    """What the template puts before the document, between document and question, and after the
    question."""
    if not chat_template or not getattr(tokenizer, "chat_template", None):
        return (
            getattr(tokenizer, "bos_token", None) or "" if chat_template else "",
            SEPARATOR,
            "\n" if chat_template else "",
        )
    content = f"{_DOCUMENT}{SEPARATOR}{_QUESTION}"
    rendered = render(tokenizer, [{"role": "user", "content": content}])
    before, found, rest = rendered.partition(_DOCUMENT)
    between, found_question, after = rest.partition(_QUESTION)
    if not found or not found_question:
        raise ValueError(
            "this model's chat template does not contain the user's message; "
            "choose an instruction model"
        )
    return before, between, after


def message_parts(tokenizer: Any) -> tuple[str, str]:
    """What the chat template puts around one message of the user; nothing without a template."""
    if not getattr(tokenizer, "chat_template", None):
        return "", ""
    rendered = render(tokenizer, [{"role": "user", "content": _DOCUMENT}])
    before, _, after = rendered.partition(_DOCUMENT)
    return before, after


def follow_up_ids(tokenizer: Any, question: str) -> list[int]:
    """Tokens that lead from the end of an answer to the next answer, the new question between.

    The question is data: special tokens spelled in it are read as plain text.
    """
    if not getattr(tokenizer, "chat_template", None):
        before, after = SEPARATOR, "\n"
    else:
        turns = [
            {"role": "user", "content": _DOCUMENT},
            {"role": "assistant", "content": _ANSWER},
            {"role": "user", "content": _QUESTION},
        ]
        rendered = render(tokenizer, turns)
        before, _, after = rendered.partition(_ANSWER)[2].partition(_QUESTION)
    token_ids: list[int] = []
    for text, plain in ((before, False), (question, True), (after, False)):
        encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=plain)
        token_ids += encoded["input_ids"]
    return token_ids


def render(tokenizer: Any, turns: list[dict[str, str]]) -> str:
    """A conversation in the chat template's words, up to where the next answer begins.

    Raises:
        ValueError: if the template has a syntax error, or refuses the conversation.
    """
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is a program and raises what it likes
        fault = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f"this model's chat template fails ({fault}); mend its "
            "chat_template.jinja, or feed plain text with chat_template=False"
        ) from error
