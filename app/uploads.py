"""Uploaded files: read, checked and deleted at once, or one sentence says what is wrong."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import dynamickv as dkv

from .inputs import MAX_CHARACTERS

MAX_UPLOAD_BYTES = 2 * 2**20
MAX_EXAMPLE_BYTES = 8 * 2**20
MAX_EXAMPLES = 20
MAX_ANSWER_CHARACTERS = 20_000
"""Of one example's answers and classes: scoring takes the product of this and our answer."""
TEXT_SUFFIXES = (".txt", ".md")
RUN_SUFFIXES = (".json", ".gz")
TASK_NAME = re.compile(r"\w[\w-]{0,63}")


def _take(file: Path, suffixes: Sequence[str], most: int, remedy: str) -> bytes:
    """The bytes of an upload, which is deleted.

    Raises:
        ValueError: another ending, or more than `most` bytes.
    """
    try:
        if file.suffix.lower() not in suffixes:
            raise ValueError(
                f"{file.name} cannot be read here: upload a {' or '.join(suffixes)} file."
            )
        with file.open("rb") as handle:
            raw = handle.read(most + 1)
    finally:
        file.unlink(missing_ok=True)
    if len(raw) > most:
        raise ValueError(f"{file.name} is larger than {most // 2**20} MiB: {remedy}.")
    return raw


def read_text_upload(path: str | os.PathLike[str]) -> str:
    """The text of an uploaded .txt or .md file, which is deleted.

    Raises:
        ValueError: not such a file, too large, or no text.
    """
    file = Path(path)
    raw = _take(file, TEXT_SUFFIXES, MAX_UPLOAD_BYTES, "shorten it")
    text = raw.decode("utf-8-sig", "replace")
    if b"\0" in raw or text.count("\ufffd") > max(8, len(text) // 20):
        raise ValueError(
            f"{file.name} does not look like text: upload a plain .txt or .md file in UTF-8."
        )
    if not text.strip():
        raise ValueError(f"{file.name} holds no text.")
    return text


def read_run_upload(path: str | os.PathLike[str]) -> dkv.Trace:
    """The record in an uploaded run file, which is deleted.

    Raises:
        ValueError: not a run record.
    """
    file = Path(path)
    try:
        if file.suffix.lower() not in RUN_SUFFIXES:
            raise ValueError(
                f"{file.name} is not a run file: open a .json or .json.gz file saved here."
            )
        return dkv.Trace.load(file)
    finally:
        file.unlink(missing_ok=True)


def read_examples_upload(
    path: str | os.PathLike[str], task: str | None, limit: int
) -> list[dkv.evaluate.datasets.Example]:
    """The first examples of an uploaded LongBench or RULER file, which is deleted.

    Args:
        task: a task's name; None: the file's name without its ending.

    Raises:
        ValueError: not such a file, too large, no such task, or a malformed line.
    """
    file = Path(path)
    raw = _take(file, (".jsonl",), MAX_EXAMPLE_BYTES, "upload its first lines")
    name = file.stem if task is None else task
    if not TASK_NAME.fullmatch(name):
        raise ValueError(f"{name[:64]!r} is no task's name: choose the task from the list.")
    examples = dkv.evaluate.datasets.read_lines(raw.splitlines(), file.name, name, limit)
    for number, example in enumerate(examples, start=1):
        longest = max(map(len, example.fields.values()))
        answers = sum(map(len, [*example.answers, *(example.all_classes or [])]))
        if longest > MAX_CHARACTERS:
            raise ValueError(
                f"Example {number} has {longest:,} characters and this page reads "
                f"{MAX_CHARACTERS:,}: shorten it."
            )
        if answers > MAX_ANSWER_CHARACTERS:
            raise ValueError(
                f"Example {number} has {answers:,} characters of answers and this page reads "
                f"{MAX_ANSWER_CHARACTERS:,}: leave some out."
            )
    return examples
