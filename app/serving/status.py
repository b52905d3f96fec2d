"""The status line in one way everywhere: idle, running, waiting, ended, failed. No widgets."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping
from typing import Any

import dynamickv as dkv
from app.settings import LABELS
from app.wording import count, seconds

from .turns import Place

log = logging.getLogger(__name__)
Status = dict[str, Any]
TOLD = (ValueError, OSError, MemoryError)
"""Errors whose text is a sentence for the visitor already."""


def idle(message: str = "", detail: str = "") -> Status:
    """Nothing goes on; by default there is nothing to say either."""
    return {"state": "idle", "message": message, "detail": detail}


def running(message: str, done: float = 0) -> Status:
    """Something goes on; `done` is the share that is done."""
    return {"state": "running", "message": message, "detail": "", "done": round(done, 3)}


def reading(event: dkv.Progress, share: float = 1) -> Status:
    """How far the prefill is; it takes that share of the progress bar."""
    return running(
        f"Reading the prompt (prefill): layer {event.completed} of {event.total}",
        share * event.completed / max(event.total, 1),
    )


def waiting(place: Place) -> Status:
    """A run waits for others."""
    status = running(f"Waiting for your turn: {count(place.ahead, 'run')} before yours")
    if place.seconds:
        status["detail"] = f"about {seconds(place.seconds)}, judging by the last runs"
    elif place.ahead and place.seconds is not None:
        status["detail"] = "longer than estimated, judging by the last runs"
    return status


def ended(trace: dkv.Trace, start: float) -> Status:
    """A run is over that began at `start`, in seconds of `time.perf_counter`."""
    return idle(
        "Stopped: the answers are partial, what was kept is complete."
        if cancelled(trace)
        else "Done.",
        f"{time.perf_counter() - start:.1f} s in all",
    )


def failed(error: object) -> Status:
    """An error, in its own words."""
    return {"state": "error", "message": sentence_of(error), "detail": "Your inputs are kept."}


def told(error: Exception, event: str, noun: str, remedy: str) -> Status:
    """An error that may be a surprise: then its kind is said with a remedy, and logged as `event`
    with its place, without its text.
    """
    if isinstance(error, TOLD):
        return failed(error)
    log.error(event, exc_info=error)
    return failed(f"The {noun} failed ({type(error).__name__}): {remedy}.")


def sentence_of(error: object, labels: Mapping[str, str] = LABELS) -> str:
    """An error as a sentence: the form's numbers as it calls them, capital first, but not in a
    parameter's or file's name, full stop last.

    Args:
        labels: what stands for parameters' names; none beside code, which has the names.
    """
    text = str(error).strip() or type(error).__name__
    for name, label in labels.items():
        # "window_size=8" is a name with its value; "window_size.txt" is somebody's file.
        text = re.sub(rf"(?<![\w-]){name}=", f"{label} ", text)
        text = re.sub(rf"(?<![\w-]){name}(?![\w-]|\.\w)", label, text)
    first = text[0] if re.search(r"[_.]\w", text.split(maxsplit=1)[0]) else text[0].upper()
    return first + text[1:] + ("" if text[-1] in ".!?" else ".")


def cancelled(trace: dkv.Trace) -> bool:
    """Whether a run of it was stopped."""
    return any(run.finish_reason == "cancelled" for run in trace.runs)
