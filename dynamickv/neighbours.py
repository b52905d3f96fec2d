"""How torch's threads wait for one another: spinning, or asleep while others want the cores.

GNU OpenMP's threads spin at the end of every operation until the last of them arrives. On cores of
their own that is fastest; beside other programs the one that is waited for may not run, and the
time of those that spin is lost. How long they spin is settled when torch loads (`threads.py`), but
where there are more threads than cores OpenMP lets them sleep almost at once. A second team of
threads, which does nothing, makes it so for as long as it exists.

Linux tells a thread how long it was ready and had to wait for a core; elsewhere nothing is done.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from functools import cache
from typing import Any

import torch

TIMES = "/proc/thread-self/schedstat"
"""Of the thread that reads it: nanoseconds it ran and nanoseconds it was ready and did not run."""
MILLISECOND = 1_000_000
ENTER, CROWDED = 50 * MILLISECOND, 0.2
"""The cores are wanted once a thread waited for more than this share of so long a time."""
LEAVE, CALM = 500 * MILLISECOND, 0.1
"""They are free again once it waited for less than this share of so long a time."""
SOFT = 1
"""OpenMP's omp_pause_soft: threads end, settings stay."""


@cache
def openmp() -> Any:
    """Torch's own OpenMP runtime where that is GNU's, or None."""
    try:
        found = ctypes.CDLL(torch._C.__file__)
        for name in ("GOMP_parallel", "omp_pause_resource_all", "omp_get_thread_num"):
            getattr(found, name)
    except (AttributeError, OSError):
        return None
    found.GOMP_parallel.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_uint,
        ctypes.c_uint,
    ]
    found.GOMP_parallel.restype = None
    return found


def give_back_threads() -> None:
    """End the team of threads that torch started for this thread; the next operation starts one.

    A thread that no longer computes would otherwise keep its team, which makes the teams of others
    sleep while they wait.
    """
    runtime = openmp()
    if runtime is not None:
        runtime.omp_pause_resource_all(SOFT)


class Neighbours:
    """Watches whether other programs want the cores while this one computes; as long as they do,
    torch's threads sleep while they wait. It lasts as long as the object."""

    def __init__(self, device: torch.device) -> None:
        """
        Args:
            device: where the model computes; on others than the CPU nothing is watched.
        """
        self._watches = device.type == "cpu" and openmp() is not None
        self._thread = 0
        self._ran = self._waited = 0
        self._idle: _IdleTeam | None = None

    @property
    def crowded(self) -> bool:
        """Whether others were found to want the cores."""
        return self._idle is not None

    def look(self) -> None:
        """Called between steps, some milliseconds apart or more, by the thread that computes."""
        if not self._watches:
            return
        times = thread_times()
        if times is None:
            self._watches = False
            return
        thread = threading.get_ident()
        ran, waited = times[0] - self._ran, times[1] - self._waited
        if thread == self._thread and not self._told(ran, waited):
            return
        self._thread, (self._ran, self._waited) = thread, times

    def _told(self, ran: int, waited: int) -> bool:
        """Whether these nanoseconds were enough to tell; what they tell is done."""
        if ran + waited < (LEAVE if self.crowded else ENTER):
            return False
        share = waited / (ran + waited)
        if not self.crowded and share > CROWDED:
            self._idle = _IdleTeam()
        elif self.crowded and share < CALM:
            self._idle = None
        return True


class _IdleTeam:
    """As many threads as there are cores, asleep until the object is gone."""

    def __init__(self) -> None:
        end = threading.Event()
        threading.Thread(target=_sleep, args=(end,), name="idle-team", daemon=True).start()
        weakref.finalize(self, end.set)


def _sleep(end: threading.Event) -> None:
    # Any C function would do: OpenMP keeps the threads that ran it until this one ends.
    runtime = openmp()
    runtime.GOMP_parallel(runtime.omp_get_thread_num, None, len(os.sched_getaffinity(0)), 0)
    end.wait()


def thread_times() -> tuple[int, int] | None:
    """Nanoseconds that the calling thread ran, and that it was ready and did not; None where the
    system does not tell."""
    try:
        with open(TIMES, encoding="ascii") as file:
            ran, waited, _ = file.read().split()
    except OSError:
        return None
    return int(ran), int(waited)
