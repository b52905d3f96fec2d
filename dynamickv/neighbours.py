"""How torch's threads wait for one another: spinning, or asleep while others want the cores.

GNU OpenMP's threads spin at the end of every operation until the last of them arrives. On cores of
their own that is fastest; beside other programs the one that is waited for may not run, and the
time of those that spin is lost. How long they spin is settled when torch loads (`threads.py`), but
where there are more threads than cores OpenMP lets them sleep almost at once. A second team of
threads, which does nothing, makes it so for as long as it exists.

Asleep, each thread still waits for the one whose core another program has just then. Two threads,
on two cores, are therefore kept together on one, where they take turns; the system gives others the
other. Beside two spinning processes a step takes 1.4 to 1.8 times as long as alone then, where it
took 1.6 or 3 times by where the system had put the threads. Of more threads on half as many cores,
4 took as long as without, and 16 up to 1.4 times as long.

Linux tells a thread how long it was ready and had to wait for a core; elsewhere nothing is done.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch

TIMES = "/proc/thread-self/schedstat"
"""Of the thread that reads it: nanoseconds it ran and nanoseconds it was ready and did not run."""
PLACE = "/proc/thread-self/stat"
"""Of the thread that reads it, the core it runs on, after many other things."""
MILLISECOND = 1_000_000
ENTER, CROWDED = 50 * MILLISECOND, 0.2
"""The cores are wanted once a thread waited for more than this share of so long a time."""
LEAVE, CALM = 500 * MILLISECOND, 0.1
"""They are free again once it waited for less than this share of so long a time."""
TWO = 2
"""Threads that keep together, on as many cores."""
GATHERED, TRIED = 2000 * MILLISECOND, 50 * MILLISECOND
"""How long they do until it is tried without, and for how long. Together they wait for each other,
so that their waiting tells nothing of others."""
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
    torch's threads sleep while they wait and keep together. It lasts until `rest`, or as long as
    the object."""

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
        self._gathering: Gathering | None = None
        self._enough = ENTER
        """Time after which is decided what to do."""

    def __enter__(self) -> Neighbours:
        return self

    def __exit__(self, *_: object) -> None:
        self.rest()

    @property
    def crowded(self) -> bool:
        """Whether others were found to want the cores."""
        return self._free is not None

    @property
    def gathered(self) -> bool:
        """Whether threads keep together."""
        return self._gathering is not None

    @contextmanager
    def step(self) -> Iterator[None]:
        """`look`, and compute; afterwards all threads may run anywhere, and so may those that they
        start before the next step."""
        self.look()
        try:
            yield
        finally:
            if self._gathering is not None:
                self._gathering.let_go()

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Between two looks, around what is not computed here and may start threads or programs."""
        gathering = self._gathering
        if gathering is not None:
            gathering.let_go()
        try:
            yield
        finally:
            if gathering is not None:
                gathering.keep()

    def look(self) -> None:
        """Called by the thread that computes, some milliseconds apart or more."""
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
        if spent >= self._enough:
            self._decide(self._waited / spent)
            self._ran = self._waited = 0
        if self._gathering is not None:
            self._gathering.keep()

    def _decide(self, waiting: float) -> None:
        """By the share of its time that a thread was kept waiting."""
        if self.gathered:
            self._spread()
            self._enough = TRIED
        elif waiting > (CALM if self.crowded else CROWDED):
            self._make_way()
        else:
            self.rest()

    def rest(self) -> None:
        """Nothing is computed any more."""
        self._spread()
        if self._free is not None:
            self._free()
            self._free = None
        self._enough = ENTER

    def _spread(self) -> None:
        if self._gathering is not None:
            self._gathering.end()
            self._gathering = None

    def _make_way(self) -> None:
        team = idle_team()
        if not self.crowded:
            try:
                team.enter()
            except RuntimeError:  # no thread can be started
                self._watches = False
                return
            self._free = weakref.finalize(self, team.leave)
        self._enough = LEAVE
        if torch.get_num_threads() == TWO == len(os.sched_getaffinity(0)):
            self._gathering = Gathering()
            self._enough = GATHERED


class Gathering:
    """Keeps threads and their teams on one core, until `end`, or as long as the object."""

    def __init__(self) -> None:
        thread = threading.get_native_id()
        self._core = kept_cores().take(os.sched_getaffinity(0), thread)
        self._kept: dict[int, set[int]] = {}
        """Where each thread that is kept could run before."""
        self.end = weakref.finalize(self, _end, self._kept, self._core, thread)
        """Let all threads run where they could before."""

    def keep(self) -> None:
        """The calling thread and its team, which may be another than before, or have been moved by
        another gathering."""
        self.let_go()
        before = os.sched_getaffinity(0)
        if self._core not in before:
            return

        def gather(_: object) -> None:
            self._kept[threading.get_native_id()] = before
            with suppress(OSError):  # where the system does not permit it
                os.sched_setaffinity(0, {self._core})

        function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(gather)
        # `ctypes.cast` would make a circle of references, and this object last until it is found.
        address = ctypes.c_void_p.from_buffer(function).value
        openmp().GOMP_parallel(address, None, torch.get_num_threads(), 0)

    def let_go(self) -> None:
        """Of all threads, until the next `keep`."""
        _let_go(self._kept, self._core)


def _end(kept: dict[int, set[int]], core: int, thread: int) -> None:
    _let_go(kept, core)
    kept_cores().give_back(core, thread)


def _let_go(kept: dict[int, set[int]], core: int) -> None:
    """Let threads run where they could before, but those that someone else has placed since."""
    while kept:
        thread, before = kept.popitem()
        # Another program's thread can bear the number of one that is gone.
        if os.path.exists(f"/proc/self/task/{thread}"):
            with suppress(OSError):
                if os.sched_getaffinity(thread) == {core}:
                    os.sched_setaffinity(thread, before)


class KeptCores:
    """Which threads' gatherings of this process keep to which core."""

    def __init__(self) -> None:
        # Collecting garbage can end a gathering while one is begun in the same thread.
        self._lock = threading.RLock()
        self._kept: defaultdict[int, list[int]] = defaultdict(list)

    def take(self, allowed: set[int], thread: int) -> int:
        """The core that the thread keeps to already: its gatherings take turns. Else that to which
        fewest keep; of several the one that the calling thread runs on, as the system has put other
        processes' threads on others."""
        here = current_core()
        with self._lock:
            core = min(
                allowed,
                key=lambda core: (
                    thread not in self._kept[core],
                    len(self._kept[core]),
                    core != here,
                    core,
                ),
            )
            self._kept[core].append(thread)
        return core

    def give_back(self, core: int, thread: int) -> None:
        """What was taken."""
        with self._lock:
            self._kept[core].remove(thread)


@cache
def kept_cores() -> KeptCores:
    """This process's."""
    return KeptCores()


def current_core() -> int | None:
    """The core that the calling thread runs on; None where the system does not tell."""
    try:
        with open(PLACE, encoding="utf-8", errors="replace") as file:
            # The program's name, in brackets, may hold anything.
            return int(file.read().rpartition(")")[2].split()[36])
    except (OSError, ValueError, IndexError):
        return None


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
