"""Arrays of a run record as text: which positions were kept, and how they scored."""

from __future__ import annotations

import base64
import binascii
import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Retained:
    """Which prompt positions a run kept: one bit per layer, head and position."""

    heads: int
    bits: str
    """base64 of numpy.packbits (most significant bit first) over (layer, head, position) in C
    order."""

    @classmethod
    def pack(cls, mask: np.ndarray) -> Retained:
        """Pack a boolean (layers, heads, positions) array."""
        return cls(
            heads=int(mask.shape[1]),
            bits=base64.b64encode(np.packbits(mask.reshape(-1)).tobytes()).decode("ascii"),
        )

    def unpack(self, num_layers: int, length: int) -> np.ndarray:
        """Boolean (layers, heads, positions)."""
        size = num_layers * self.heads * length
        packed = np.frombuffer(_decode_base64(self.bits, "retained.bits"), np.uint8)
        if packed.size != math.ceil(size / 8):
            raise ValueError(
                f"retained.bits holds {packed.size} bytes where {num_layers} layers x {self.heads} "
                f"heads x {length} positions need {math.ceil(size / 8)}; save the run again"
            )
        return (
            np.unpackbits(packed, count=size).astype(bool).reshape(num_layers, self.heads, length)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Importance of every position, averaged over heads and scaled per layer to 0..255."""

    bytes: str
    """base64 of uint8 (layer, position) in C order."""

    @classmethod
    def pack(cls, scores: np.ndarray) -> Scores:
        """Pack a uint8 (layers, positions) array."""
        return cls(
            bytes=base64.b64encode(np.ascontiguousarray(scores, np.uint8).tobytes()).decode("ascii")
        )

    def unpack(self, num_layers: int, length: int) -> np.ndarray:
        """uint8 (layers, positions)."""
        raw = np.frombuffer(_decode_base64(self.bytes, "scores.bytes"), np.uint8)
        if raw.size != num_layers * length:
            raise ValueError(
                f"scores.bytes holds {raw.size} values where {num_layers} layers x {length} "
                f"positions need {num_layers * length}; save the run again"
            )
        return raw.reshape(num_layers, length)


def _decode_base64(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"{where} is not base64; save the run again") from None
