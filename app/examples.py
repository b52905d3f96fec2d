"""Example documents and their recorded runs, read from assets/. A broken file is left out, never a
broken page.
"""

from __future__ import annotations

import gzip
import json
import logging
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from app.record.words import document_of
from dynamickv.record.trace import Trace

log = logging.getLogger(__name__)
ASSETS = Path(__file__).parent.parent / "assets"
OWN_TEXT = "own"
"""What the example picker holds while the document is nobody's example."""
EXAMPLE_KEY = "example:"
"""What the keys of built-in examples' records begin with."""


@dataclass(frozen=True)
class Example:
    """A document with a question, the capacity at which comparing teaches something, and its
    recorded run.
    """

    id: str
    title: str
    kind: str
    question: str
    capacity: int
    max_new_tokens: int
    document: str
    run_file: Path | None
    expected: tuple[str, ...] = ()
    """Facts that a right answer holds, as the document words them."""
    model: str = ""
    """What a loss of the gallery was recorded with, as people call it."""
    lost: str = ""
    """What is lost and why, in one line; empty for an example that is no loss."""

    @cached_property
    def trace(self) -> Trace | None:
        """The recorded run, if there is a readable one."""
        if self.run_file is None:
            return None
        try:
            return Trace.load(self.run_file)
        except (OSError, ValueError) as error:
            log.warning("recorded run %s left out: %s", self.run_file.name, error)
            return None

    @cached_property
    def reads(self) -> dict[str, Any] | None:
        """What the recorded answer of FullKV read, as `dynamickv.reads` says it; None where that is
        not recorded.
        """
        path = None if self.run_file is None else reads_file(self.run_file)
        if path is None or not path.is_file():
            return None
        try:
            found: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
        except (OSError, ValueError, EOFError) as error:
            log.warning("recorded reads %s left out: %s", path.name, error)
            return None
        return found

    def facts_in(self, answer: str) -> list[bool]:
        """Which of the expected facts an answer holds, as whole words, without case."""
        return [
            re.search(rf"(?<![0-9a-z]){re.escape(fact)}(?![0-9a-z])", answer, re.IGNORECASE)
            is not None
            for fact in self.expected
        ]

    def is_document(self, text: object) -> bool:
        """Whether a text is this example's; browsers read every line end as "\\n"."""
        texts = [self.document]
        if self.trace is not None:
            texts.append(document_of(self.trace.prompt))
        return any(own.splitlines() == str(text).splitlines() for own in texts)

    @property
    def key(self) -> str:
        """What its record goes by among those that the page holds."""
        return f"{EXAMPLE_KEY}{self.id}"

    @property
    def label(self) -> str:
        """What the picker shows."""
        return f"{self.title} ({self.model})" if self.model else self.title


def reads_file(run_file: Path) -> Path:
    """Where what an answer read lies beside its recorded run."""
    return run_file.parent.parent / "reads" / run_file.name


KINDS = ("needle", "find a fact", "story", "summarise", "few-shot", "code")
"""The order in which examples are offered; first the one whose answers differ most plainly."""


def _place(kind: str) -> int:
    return KINDS.index(kind) if kind in KINDS else len(KINDS)


def load_examples(assets: Path = ASSETS) -> dict[str, Example]:
    """Every readable example by id: those with a recorded run first, then by kind."""
    examples = []
    for path in sorted((assets / "examples").glob("*.json")):
        try:
            examples.append(read_example(path, assets))
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("example %s left out: %s", path.name, error)
    examples.sort(key=lambda example: (example.run_file is None, _place(example.kind)))
    return {example.id: example for example in examples}


def load_gallery(assets: Path = ASSETS) -> dict[str, Example]:
    """Every recorded loss by id, as an example whose record is of any model."""
    folder = assets / "gallery"
    try:
        entries = json.loads((folder / "gallery.json").read_text(encoding="utf-8"))
        found = [read_loss(entry, folder) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("the gallery is left out: %s", error)
        return {}
    return {loss.id: loss for loss in found if loss.trace is not None}


def read_loss(entry: dict[str, Any], folder: Path) -> Example:
    """One loss: its description, its document and its record."""
    run_file = folder / "runs" / f"{entry['id']}.json.gz"
    return Example(
        id=str(entry["id"]),
        title=str(entry["title"]),
        kind="loss",
        question=str(entry["question"]),
        capacity=int(entry["capacity"]),
        max_new_tokens=int(entry["max_new_tokens"]),
        document=(folder / entry["document"]).read_text(encoding="utf-8"),
        run_file=run_file if run_file.is_file() else None,
        expected=tuple(map(str, entry["expected"])),
        model=str(entry["model"]),
        lost=str(entry["lost"]),
    )


def read_example(path: Path, assets: Path) -> Example:
    """One example: its description (JSON) and its text beside it."""
    data = json.loads(path.read_text(encoding="utf-8"))
    expected = data.get("expected", [])
    if not isinstance(expected, list):
        raise TypeError(f"expected must be a list of facts, got {expected!r}")
    run_file = assets / "runs" / f"{data['id']}.json.gz"
    return Example(
        id=str(data["id"]),
        title=str(data["title"]),
        kind=str(data.get("kind", "")),
        question=str(data["question"]),
        capacity=int(data["capacity"]),
        max_new_tokens=int(data["max_new_tokens"]),
        document=(path.parent / Path(data["document"]).name).read_text(encoding="utf-8"),
        run_file=run_file if run_file.is_file() else None,
        expected=tuple(map(str, expected)),
    )
