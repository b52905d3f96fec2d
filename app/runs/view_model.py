"""Every method in words, from the engine's own docstrings: what it keeps, where it comes from, and
where it departs from its authors' code.
"""

from __future__ import annotations

import inspect
import re

import dynamickv as dkv

ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


def method_cards() -> str:
    """Markdown, one paragraph group per registered method; names of parameters become code."""
    return "\n\n".join(card(name, method) for name, method in dkv.METHODS.items())


def card(name: str, method: type[dkv.CompressionMethod]) -> str:
    """One method: its docstring, and the source its module names."""
    words = as_markdown(inspect.getdoc(method) or "")
    module = " ".join((inspect.getdoc(inspect.getmodule(method)) or "").split())
    source = ARXIV.search(module)
    link = f" [arXiv:{source[1]}](https://arxiv.org/abs/{source[1]})" if source else ""
    return f"#### {name}{link}\n{words}"


def as_markdown(text: str) -> str:
    """A docstring as Markdown: paragraphs stay, underscores in names are no emphasis."""
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
    plain = "\n\n".join(paragraphs)
    return re.sub(r"(?<!`)\b(\w+_\w+)\b(?!`)", r"`\1`", plain)
