"""SnapKV: the same budget in every layer, spent on what the observation window attends to
(arXiv:2404.14469)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dynamickv.methods.base import ScoredMethod


@dataclass(frozen=True, kw_only=True)
class SnapKV(ScoredMethod):
    """Keep what the last queries attend to, pooled so that phrases survive whole; every layer keeps
    `capacity`.

    Departures from the reference (KVCache-Factory): a prompt with n <= capacity is kept whole and
    in order, scores stay float32, kept positions are stored in position order, the default
    granularity is the KV head.
    """

    name: ClassVar[str] = "SnapKV"
