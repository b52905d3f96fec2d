"""Torch's threads sleep while others want the cores, and only then."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from dynamickv import neighbours
from dynamickv.neighbours import MILLISECOND, Neighbours, give_back_threads, openmp, thread_times

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or thread_times() is None or openmp() is None,
    reason="only Linux tells, and only GNU's threads hear it",
)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], None]:
    """Lets this thread have run and waited for so many milliseconds more."""
    told = [0, 0]
    monkeypatch.setattr(neighbours, "thread_times", lambda: (told[0], told[1]))

    def passes(ran: float, waited: float) -> None:
        told[0] += int(ran * MILLISECOND)
        told[1] += int(waited * MILLISECOND)

    return passes


def asleep() -> int:
    """Teams that do nothing."""
    return sum(thread.name == "idle-team" for thread in threading.enumerate())


def eventually(reached: Callable[[], bool]) -> bool:
    end = time.monotonic() + 20
    while not reached() and time.monotonic() < end:
        time.sleep(0.01)
    return reached()


def test_threads_sleep_while_others_want_the_cores_and_no_longer(
    clock: Callable[[float, float], None],
) -> None:
    watched = Neighbours(CPU)
    watched.look()
    clock(40, 40)
    watched.look()
    assert watched.crowded
    assert eventually(lambda: asleep() == 1)
    clock(300, 10)
    watched.look()
    assert watched.crowded, "half a second tells"
    clock(300, 10)
    watched.look()
    assert not watched.crowded
    assert eventually(lambda: asleep() == 0)


@pytest.mark.parametrize(
    ("ran", "waited"), [(30, 15), (900, 90)], ids=["too short to tell", "a tenth"]
)
def test_a_little_waiting_changes_nothing(
    clock: Callable[[float, float], None], ran: float, waited: float
) -> None:
    watched = Neighbours(CPU)
    watched.look()
    clock(ran, waited)
    watched.look()
    assert not watched.crowded


def test_short_looks_add_up(clock: Callable[[float, float], None]) -> None:
    watched = Neighbours(CPU)
    watched.look()
    for _ in range(6):
        clock(5, 5)
        watched.look()
    assert watched.crowded


def test_what_another_thread_waited_does_not_count(
    clock: Callable[[float, float], None],
) -> None:
    watched = Neighbours(CPU)
    other = threading.Thread(target=watched.look)
    other.start()
    other.join()
    clock(50, 50)
    watched.look()
    assert not watched.crowded


def test_threads_wake_once_nobody_watches(clock: Callable[[float, float], None]) -> None:
    watched = Neighbours(CPU)
    watched.look()
    clock(50, 50)
    watched.look()
    assert eventually(lambda: asleep() == 1)
    del watched
    assert eventually(lambda: asleep() == 0)


def test_a_gpu_is_not_watched(clock: Callable[[float, float], None]) -> None:
    watched = Neighbours(torch.device("cuda"))
    watched.look()
    clock(50, 50)
    watched.look()
    assert not watched.crowded


def test_a_system_that_does_not_tell_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "TIMES", "/proc/no-such-thread/schedstat")
    watched = Neighbours(CPU)
    watched.look()
    monkeypatch.undo()
    watched.look()
    assert not watched.crowded


def test_processes_that_never_rest_are_noticed() -> None:
    command = [sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(command) for _ in range(2 * len(os.sched_getaffinity(0)))]
    watched = Neighbours(CPU)
    x = torch.randn(400, 400)

    def noticed() -> bool:
        watched.look()
        torch.mm(x, x)
        return watched.crowded

    try:
        end = time.monotonic() + 60
        while not noticed() and time.monotonic() < end:
            pass
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert watched.crowded


def test_a_thread_gives_its_team_back() -> None:
    counts = []

    def compute() -> None:
        torch.set_num_threads(2)
        before = len(os.listdir("/proc/self/task"))
        torch.exp(torch.zeros(2**20))
        counts.append(len(os.listdir("/proc/self/task")) - before)
        give_back_threads()
        counts.append(len(os.listdir("/proc/self/task")) - before)
        counts.append(int(torch.exp(torch.zeros(2**20)).sum().item()) - 2**20)

    thread = threading.Thread(target=compute)
    thread.start()
    thread.join()
    assert counts == [1, 0, 0]
