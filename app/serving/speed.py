"""How long a comparison will take, judging by the last one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import dynamickv as dkv
from app.examples import Example
from app.wording import duration

MASS_RATIO = 2.0
"""Until a run here has measured it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """How fast this machine was the last time, to say an estimate before the next."""

    prefill_per_token: float
    decode_per_token: float
    origin: str
    """"the last run here" or "the recorded run"."""
    mass_ratio: float = MASS_RATIO
    """How many times as long reading takes where a method asks for the attention of all tokens."""

    @classmethod
    def of(cls, trace: dkv.Trace, origin: str, mass_ratio: float = MASS_RATIO) -> Speed:
        """What a record says about speed; of the price of all attention what was known, where no
        method of it asks for that.
        """
        steps = [step for run in trace.runs for step in run.decode_seconds[1:]]
        asking = [
            run.score_seconds
            for run in trace.runs
            if run.method in dkv.METHODS and dkv.METHODS[run.method].capabilities.mass
        ]
        if asking and trace.prefill_seconds > 0:
            mass_ratio = 1 + max(asking) / trace.prefill_seconds
        return cls(
            mass_ratio=mass_ratio,
            prefill_per_token=trace.prefill_seconds / max(trace.prompt.length, 1),
            decode_per_token=sum(steps) / len(steps) if steps else 0.05,
            origin=origin,
        )

    @classmethod
    def recorded(cls, examples: Iterable[Example]) -> Speed | None:
        """That of the first recorded run, until there is one of this machine."""
        traces = (example.trace for example in examples)
        return next((cls.of(trace, "the recorded run") for trace in traces if trace), None)

    def estimate(
        self, tokens: int, methods: int, max_new_tokens: int, mass: bool = False
    ) -> Estimate:
        """How long a comparison takes at most; its answers may end earlier. `mass`: whether a
        method asks for the attention of all tokens.
        """
        reading = self.prefill_per_token * tokens * (self.mass_ratio if mass else 1)
        seconds = reading + self.decode_per_token * methods * max_new_tokens
        return Estimate(seconds=seconds, origin=self.origin)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """How long something should take at most."""

    seconds: float
    origin: str
    """Whose speed it supposes: "the last run here"."""

    def words(self, elapsed: float = 0) -> str:
        """The estimate as one phrase, or that it did not hold."""
        if elapsed > self.seconds:
            return f"longer than the estimated {duration(self.seconds)}"
        return f"up to {duration(self.seconds)}, at the speed of {self.origin}"
