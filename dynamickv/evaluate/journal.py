"""An append-only file of measurements, one JSON object a line. Nothing that was measured is lost.

A line is written in one piece and brought to the disk before the next is measured. A crash can tear
the last line at most: the next reader leaves it out and the next writer cuts it off. Several
processes write a part each; readers see all parts.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dynamickv.models.conversion import cache_folder


class Journal:
    """The parts of one file: NAME.jsonl of process 0, NAME.1.jsonl of process 1 and so on.

    Args:
        path: NAME.jsonl.
        rank: which part this process writes.
    """

    def __init__(self, path: str | os.PathLike[str], rank: int = 0) -> None:
        self.path = Path(path)
        self.own = self.path.with_name(
            f"{self.path.stem}.{rank}{self.path.suffix}" if rank else self.path.name
        )
        self._mended = False

    def parts(self) -> list[Path]:
        """Every part that exists, process 0's first."""
        name = re.compile(rf"{re.escape(self.path.stem)}\.(\d+){re.escape(self.path.suffix)}")
        numbered = sorted(
            (int(match[1]), path)
            for path in self.path.parent.iterdir()
            if (match := name.fullmatch(path.name))
        )
        return [path for path in (self.path, *(path for _, path in numbered)) if path.is_file()]

    def read(self) -> list[dict[str, Any]]:
        """All lines of all parts, torn last lines left out.

        Raises:
            ValueError: a line in the middle that is no JSON object, by file and line.
        """
        return [row for part in self.parts() for row in _rows(part)]

    @property
    def begun(self) -> bool:
        """Whether this process's part holds a line, a torn one not counted."""
        return self.own.is_file() and any(True for _ in _rows(self.own))

    def append(self, row: dict[str, Any]) -> None:
        """Write a line and wait until it is on the disk.

        Raises:
            OSError: nothing was written, such as on a full disk; earlier lines are intact.
        """
        line = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
        with open(self.own, "ab") as file:
            if not self._mended:
                _mend(self.own)
                self._mended = True
            start = os.fstat(file.fileno()).st_size
            try:
                written = os.write(file.fileno(), line)
                if written < len(line):
                    # What stopped a short write, such as a full disk, stops the rest by its name.
                    os.write(file.fileno(), line[written:])
                os.fsync(file.fileno())
            except OSError as error:
                os.truncate(self.own, start)
                raise OSError(error.errno, os.strerror(error.errno or 0), str(self.own)) from error


def results_folder() -> Path:
    """Where a program keeps journals that nobody gave a name for."""
    return cache_folder() / "lab"


def _mend(path: Path) -> None:
    """Cut a torn last line off, or end it if only its end is missing."""
    with open(path, "rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole == len(content):
            return
        if _parsed(content[whole:]) is not None:
            file.write(b"\n")
        else:
            file.truncate(whole)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    content = path.read_bytes()
    lines = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = _parsed(line)
        if row is not None:
            yield row
        elif number < len(lines):
            raise ValueError(
                f"{path}, line {number}: no JSON object; mend or delete that line and start again"
            )


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file so that a crash leaves the old file or the new one, never half of one."""
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), str(target)) from error
    finally:
        Path(temporary).unlink(missing_ok=True)
