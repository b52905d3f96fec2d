"""Compression that goes on while answering: how much is held, and which methods can choose again.

Knows no caches; `decoding/forgetting.py` does the work.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dynamickv.methods.base import CompressionMethod, EvictingMethod
from dynamickv.methods.parameters import require_integer


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """Once `budget + buffer` positions are held (the mean per layer and head, prompt and answer
    together), the method chooses again among them, down to `budget`.

    Between two choices the cache grows by `buffer`; it never holds more than both together.
    """

    budget: int = 512
    """Mean positions per layer and head that a choice leaves, observation window included."""
    buffer: int = 128
    """Positions that are held beyond it before the next choice."""

    def __post_init__(self) -> None:
        require_integer("budget", self.budget, 1, "token")
        require_integer("buffer", self.buffer, 1, "token")

    @property
    def most(self) -> int:
        """Mean positions per layer and head that are ever held."""
        return self.budget + self.buffer

    def of_prompt(self, method: CompressionMethod) -> CompressionMethod:
        """The method as it chooses for the prompt: with its own capacity or, where more than `most`
        would be held, with the budget."""
        if isinstance(method, EvictingMethod) and method.capacity > self.most:
            return replace(method, capacity=self.budget)
        return method

    def of_answer(self, method: CompressionMethod) -> EvictingMethod:
        """The method as it chooses again: with the budget for its capacity. What was evicted from
        the prompt is gone by then.

        Raises:
            ValueError: it cannot, or not with these settings.
        """
        if not isinstance(method, EvictingMethod) or not method.capabilities.decoding:
            raise ValueError(
                f"{method.name} does not choose again while answering; "
                "leave decoding out, or choose another method"
            )
        if getattr(method, "head_budgets", "uniform") == "adaptive":
            raise ValueError(
                "head_budgets='adaptive' is not served while answering; "
                "use head_budgets='uniform', or leave decoding out"
            )
        if method.pinned:
            raise ValueError(
                "pinned spans are kept of a prompt, and decoding chooses again without them; "
                "leave pinned or decoding out"
            )
        try:
            return replace(method, capacity=self.budget, evicted=())
        except ValueError as error:
            raise ValueError(f"decoding budget {self.budget}: {error}") from None


def require_decodable(
    decoding: Decoding | None, method: CompressionMethod, joint: bool = False
) -> None:
    """Raise ValueError, in one sentence, where a method cannot go on with `decoding`.

    Args:
        joint: whether the model caches a latent that all heads share, of which keys are made anew
            for every attention.
    """
    if decoding is None:
        return
    if not isinstance(decoding, Decoding):
        raise ValueError(
            f"decoding must be a Decoding(budget=512, buffer=128) or None, got {decoding!r}"
        )
    decoding.of_answer(method)
    if joint:
        raise ValueError(
            "this model caches a latent and not the keys that a choice while answering reads; "
            "leave decoding out"
        )
