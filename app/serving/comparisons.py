"""Comparisons on the page's model: their events, and how long they will take."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from threading import Event
from typing import Protocol

import dynamickv as dkv
from app.examples import Example
from app.inputs import Request

from .model_host import PromptSize
from .speed import MASS_RATIO, Estimate, Speed
from .status import cancelled
from .zero_gpu import estimate, is_zero_gpu, on_gpu

log = logging.getLogger(__name__)
CHARACTERS_PER_TOKEN = 4.2
OnPrefill = Callable[[dkv.Prefill], None]


class Models(Protocol):
    """What comparisons need of the model host."""

    def get(self, name: str) -> dkv.LoadedModel:
        """The loaded model."""

    def measure(self, name: str, document: str, question: str) -> PromptSize | None:
        """Length of a prompt, or None while the model is not loaded."""


class Comparisons:
    """Runs them, and remembers how fast the last one was; not whose it was."""

    def __init__(self, models: Models, examples: Iterable[Example] = ()) -> None:
        self._models = models
        self._speed = Speed.recorded(examples)
        self._on_gpu = on_gpu(self._gpu_events, self._gpu_seconds)

    def stream(
        self,
        model: str,
        job: Request,
        stop: Event,
        on_prefill: OnPrefill | None = None,
        *,
        scores: bool = True,
    ) -> Iterator[dkv.Event]:
        """A comparison's events. On ZeroGPU it runs in another process: its prefill stays there."""
        if not is_zero_gpu():
            yield from self._events(model, job, scores, on_prefill, stop.is_set)
            return
        with closing(self._on_gpu(model, job, scores)) as events:
            for event in events:
                if stop.is_set():
                    return
                yield event

    def estimate(self, model: str, job: Request) -> Estimate | None:
        """How long a job will take; None until the model is loaded and a speed is known."""
        size = self._models.measure(model, job.document, job.question)
        if size is None or self._speed is None:
            return None
        return self._speed.estimate(
            min(size.prompt, size.limit),
            len(job.methods),
            job.max_new_tokens,
            any(method.needs_mass for method in job.methods),
        )

    @property
    def mass_ratio(self) -> float:
        """How many times as long reading takes where a method asks for all attention."""
        return MASS_RATIO if self._speed is None else self._speed.mass_ratio

    def seconds(self, model: str, job: Request) -> float | None:
        """The same in seconds, for those who wait."""
        estimate = self.estimate(model, job)
        return estimate.seconds if estimate else None

    def learn(self, trace: dkv.Trace) -> None:
        """Judge by this comparison from now on, if it was not stopped."""
        if not cancelled(trace):
            self._speed = Speed.of(trace, "the last run here", self.mass_ratio)

    def _events(
        self,
        model: str,
        job: Request,
        scores: bool,
        on_prefill: OnPrefill | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Iterator[dkv.Event]:
        return dkv.compare_stream(
            self._models.get(model),
            job.document,
            job.question,
            methods=job.methods,
            max_new_tokens=job.max_new_tokens,
            truncate=job.truncate,
            scores=scores,
            on_prefill=on_prefill,
            should_stop=should_stop,
            question_aware=job.question_aware,
            expected=job.expected,
            decoding=job.decoding,
            watch=scores,  # who looks at scores looks on; the endpoint does neither
        )

    def _gpu_events(
        self, model: str, job: Request, scores: bool
    ) -> Generator[dkv.Event, None, None]:
        yield from self._events(model, job, scores)

    def _gpu_seconds(self, model: str, job: Request, scores: bool = True) -> int:
        """GPU seconds a comparison asks for; the arguments are those of `_gpu_events`."""
        size = self._models.measure(model, job.document, job.question)
        tokens = size.prompt if size else round(len(job.document) / CHARACTERS_PER_TOKEN)
        return estimate(tokens, len(job.methods), job.max_new_tokens)


def log_run(trace: dkv.Trace) -> None:
    """Log a run: sizes and times, no text."""
    log.info(
        "run finished",
        extra={
            "methods": [run.method for run in trace.runs],
            "prompt_tokens": trace.prompt.length,
            "answer_tokens": [len(run.token_ids) for run in trace.runs],
            "prefill_seconds": round(trace.prefill_seconds, 3),
            "cancelled": cancelled(trace),
        },
    )
