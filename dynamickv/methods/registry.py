"""The registry: every method by name. A new method is one file, its import and its line here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from dynamickv.methods.base import CompressionMethod
from dynamickv.methods.cake import CAKE
from dynamickv.methods.capabilities import Capabilities
from dynamickv.methods.dynamickv import DynamicKV
from dynamickv.methods.full import FullKV
from dynamickv.methods.h2o import H2O
from dynamickv.methods.keydiff import KeyDiff
from dynamickv.methods.lava import LAVa
from dynamickv.methods.manual import Manual
from dynamickv.methods.pyramidkv import PyramidKV
from dynamickv.methods.shiftkv import ShiftKV
from dynamickv.methods.snapkv import SnapKV
from dynamickv.methods.streaming_llm import StreamingLLM
from dynamickv.methods.votekv import VoteKV

METHODS: dict[str, type[CompressionMethod]] = {
    FullKV.name: FullKV,
    StreamingLLM.name: StreamingLLM,
    H2O.name: H2O,
    SnapKV.name: SnapKV,
    PyramidKV.name: PyramidKV,
    DynamicKV.name: DynamicKV,
    CAKE.name: CAKE,
    LAVa.name: LAVa,
    KeyDiff.name: KeyDiff,
    ShiftKV.name: ShiftKV,
    VoteKV.name: VoteKV,
    Manual.name: Manual,
}


def require_known(names: Iterable[str]) -> None:
    """Raise ValueError for a name that is not registered."""
    for name in names:
        if name not in METHODS:
            raise ValueError(f"there is no method {name!r}; choose from {', '.join(METHODS)}")


def capabilities(name: str) -> Capabilities:
    """A method's row of the table: what it reads, which settings it takes, and where it works.

    Raises:
        ValueError: an unknown name.
    """
    require_known([name])
    return METHODS[name].capabilities


def build_method(name: str, **settings: Any) -> CompressionMethod:
    """A method by name, with those of `settings` that it has; None leaves a default.

    Raises:
        ValueError: an unknown name, a missing or a bad parameter.
    """
    require_known([name])
    fields = dataclasses.fields(METHODS[name])
    chosen = {
        field.name: settings[field.name] for field in fields if settings.get(field.name) is not None
    }
    for field in fields:
        if field.name not in chosen and field.default is dataclasses.MISSING:
            raise ValueError(f"{name} needs {field.name}; give it a value")
    return METHODS[name](**chosen)


def build_methods(names: Iterable[str], **settings: Any) -> list[CompressionMethod]:
    """`build_method` for several names, in the registry's order, each once."""
    wanted = list(names)
    require_known(wanted)
    return [build_method(name, **settings) for name in METHODS if name in wanted]
