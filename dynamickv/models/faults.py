"""One sentence for the many ways in which a model cannot be read. Knows no model."""

from __future__ import annotations


class UnusableModelError(ValueError):
    """A sentence of ours, naming what is wrong with a model and what to do."""


def unreadable(name: str, error: Exception) -> str:
    """One sentence for the many ways in which a checkpoint cannot be read."""
    text = str(error)
    if (
        "connect" in text.lower()
        or "offline" in text.lower()
        or "couldn't find them in the cached files" in text
    ):
        return (
            f"{name} is not on this machine and the hub cannot be reached; "
            "connect, or choose a model that is here"
        )
    if "gated" in text.lower() or "401" in text or "403" in text:
        return (
            f"{name} needs permission on the hub; "
            "accept its terms there and log in with `hf auth login`"
        )
    if "404" in text or "not a valid model identifier" in text or "Repository Not Found" in text:
        return f"there is no model {name} on the hub; check its name"
    if "safetensors" in text and "no file" in text.lower():
        return (
            f"{name} holds no safetensors weights; "
            "convert it to safetensors first (pickled weights are never loaded)"
        )
    if "trust_remote_code" in text:
        return (
            f"{name} needs its own code, which is never run; choose a model that transformers knows"
        )
    return (
        f"{name} cannot be read as a language model ({first_line(error)}); "
        "check that its files are complete"
    )


def first_line(error: Exception) -> str:
    """What another library's error says, short enough for a sentence."""
    lines = (line.strip() for line in str(error).splitlines() if line.strip())
    return next(lines, type(error).__name__).rstrip(".")[:200]
