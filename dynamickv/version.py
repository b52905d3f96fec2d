"""The version and, in a checkout, its commit, in one place."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__version__ = "0.1.0"

OLDEST_TRANSFORMERS = (5, 17)
"""The oldest that models can be served with; pyproject.toml says the same."""


def transformers_serves() -> bool:
    """Whether the transformers that is installed is new enough for models."""
    try:
        numbers = re.findall(r"\d+", version("transformers"))
    except PackageNotFoundError:
        return False
    return tuple(map(int, numbers[:2])) >= OLDEST_TRANSFORMERS


TRANSFORMERS_NEEDED = (
    f"needs transformers {'.'.join(map(str, OLDEST_TRANSFORMERS))} or newer: "
    "pip install --upgrade transformers"
)

_COMMIT = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")


def checked_out(folder: Path) -> str | None:
    """The commit that is checked out in a folder, read from git's files; None where there is none.

    Whether files were changed since is not known.
    """
    try:
        git = folder / ".git"
        if git.is_file():  # a worktree says where its files are
            git = folder / git.read_text("utf-8").removeprefix("gitdir:").strip()
        head = (git / "HEAD").read_text("utf-8").strip()
        if head.startswith("ref:"):
            head = _commit_of(git, head.removeprefix("ref:").strip())
    except (OSError, ValueError):
        return None
    return head if _COMMIT.fullmatch(head) else None


def _commit_of(git: Path, ref: str) -> str:
    """Where a branch stands: its own file, or its line in packed-refs; "" where neither says."""
    common = git / "commondir"
    if common.is_file():
        git = git / common.read_text("utf-8").strip()
    if (git / ref).is_file():
        return (git / ref).read_text("utf-8").strip()
    lines = (git / "packed-refs").read_text("utf-8").splitlines()
    return next((line.partition(" ")[0] for line in lines if line.partition(" ")[2] == ref), "")


_AT_START = checked_out(Path(__file__).parent.parent)
"""Read with the code that it names: a checkout may move on while a program runs."""


def engine_version() -> dict[str, str]:
    """The engine's version, and its commit where the code lies in a checkout, by name."""
    return {"dynamickv": __version__} | ({"commit": _AT_START} if _AT_START else {})
