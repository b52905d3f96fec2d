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
    torch's threads sleep while they wait. It lasts until `rest`, or as long as the object."""

    def __init__(self, device: torch.device) -> None:
        """
        Args:
            device: where the model computes; on others than the CPU nothing is watched.
        """
        several = torch.get_num_threads() > 1
        self._watches = device.type == "cpu" and several and openmp() is not None
        self._seen: dict[int, tuple[int, int]] = {}
        """What each thread had run and waited when it looked last."""
        self._ran = self._waited = 0
        """What they did since it was told last."""
        self._free: Any = None
        """Lets the threads spin again, while they sleep for this object."""

    def __enter__(self) -> Neighbours:
        return self

    def __exit__(self, *_: object) -> None:
        self.rest()

    @property
    def crowded(self) -> bool:
        """Whether others were found to want the cores."""
        return self._free is not None

    def look(self) -> None:
        """Called between steps, some milliseconds apart or more, by the thread that computes."""
        if not self._watches:
            return
        times = thread_times()
        if times is None:
            self._watches = False
            return
        thread = threading.get_native_id()
        before = self._seen.get(thread, times)
        self._seen[thread] = times
        # A thread's number may be that of one that is gone, which had run for longer.
        self._ran += max(times[0] - before[0], 0)
        self._waited += max(times[1] - before[1], 0)
        spent = self._ran + self._waited
        if spent < (LEAVE if self.crowded else ENTER):
            return
        share = self._waited / spent
        self._ran = self._waited = 0
        if not self.crowded and share > CROWDED:
            self._sleep()
        elif self.crowded and share < CALM:
            self.rest()

    def rest(self) -> None:
        """Nothing is computed any more."""
        if self._free is not None:
            self._free()
            self._free = None

    def _sleep(self) -> None:
        team = idle_team()
        try:
            team.enter()
        except RuntimeError:  # no thread can be started
            self._watches = False
        else:
            self._free = weakref.finalize(self, team.leave)


class IdleTeam:
    """As many threads as there are cores, asleep while anyone is inside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._end = threading.Event()

    def enter(self) -> None:
        """Start them for the first.

        Raises:
            RuntimeError: the system gives no more threads.
        """
        with self._lock:
            if self._inside == 0:
                self._end = threading.Event()
                arguments = (self._end,)
                threading.Thread(
                    target=_sleep, args=arguments, name="idle-team", daemon=True
                ).start()
            self._inside += 1

    def leave(self) -> None:
        """End them with the last."""
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._end.set()


@cache
def idle_team() -> IdleTeam:
    """This process's: a second one would change nothing."""
    return IdleTeam()


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
            ran, waited, _ = map(int, file.read().split())
    except (OSError, ValueError):
        return None
    return (ran, waited) if ran else None
