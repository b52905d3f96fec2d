"""Torch's threads sleep while others want the cores, and only then."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import dynamickv as dkv
from dynamickv import neighbours
from dynamickv.neighbours import (
    MILLISECOND,
    Gathering,
    KeptCores,
    Neighbours,
    current_core,
    give_back_threads,
    openmp,
    thread_times,
)
from dynamickv.records import Attended
from tests.engine.tiny import DOCUMENT, QUESTION, tiny_llm

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
    clock(1900, 90)
    watched.look()
    assert watched.gathered, "two seconds"
    clock(5, 5)
    watched.look()
    assert watched.crowded
    assert not watched.gathered, "it is tried whether the cores are free"
    clock(40, 8)
    watched.look()
    assert not watched.gathered, "too short to tell"
    clock(100, 0)
    watched.look()
    assert not watched.crowded
    assert eventually(lambda: asleep() == 0)


def test_more_than_two_threads_sleep_where_they_are(
    clock: Callable[[float, float], None], cores: set[int]
) -> None:
    torch.set_num_threads(3)
    watched = Neighbours(CPU)
    crowd(watched, clock)
    assert watched.crowded
    assert not watched.gathered
    assert all(where == cores for where in places().values())
    clock(300, 10)
    watched.look()
    assert watched.crowded, "half a second tells"
    clock(300, 10)
    watched.look()
    assert not watched.crowded


@pytest.mark.parametrize("waited", [7, 40], ids=["a little", "half of it"])
def test_threads_gather_again_while_cores_are_not_free(
    clock: Callable[[float, float], None], waited: float
) -> None:
    watched = Neighbours(CPU)
    for ran, more in ((0, 0), (40, 40), (2000, 2000), (50, waited)):
        clock(ran, more)
        watched.look()
    assert watched.gathered


def places() -> dict[int, set[int]]:
    """The cores that each thread of this process may run on."""
    found = {}
    for thread in map(int, os.listdir("/proc/self/task")):
        with suppress(ProcessLookupError):
            found[thread] = os.sched_getaffinity(thread)
    return found


@pytest.fixture
def cores() -> Iterator[set[int]]:
    """Two of this process's, to which it keeps."""
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        pytest.skip("needs two cores")
    two = set(sorted(allowed)[:2])
    place(two)
    yield two
    place(allowed)


def place(cores: set[int]) -> None:
    """Let all threads of this process run on these."""
    for thread in places():
        with suppress(ProcessLookupError):
            os.sched_setaffinity(thread, cores)


def crowd(watched: Neighbours, clock: Callable[[float, float], None]) -> None:
    """Let it find out that others want the cores."""
    watched.look()
    clock(40, 40)
    watched.look()


def test_a_team_keeps_to_one_core_and_is_let_go(
    clock: Callable[[float, float], None], cores: set[int]
) -> None:
    torch.exp(torch.zeros(2**20))
    watched = Neighbours(CPU)
    crowd(watched, clock)
    kept = {thread: where for thread, where in places().items() if len(where) == 1}
    assert threading.get_native_id() in kept
    assert len(kept) == 2
    assert len(set(map(frozenset, kept.values()))) == 1
    watched.rest()
    assert all(where == cores for where in places().values())


def test_between_its_steps_a_thread_may_run_anywhere(
    clock: Callable[[float, float], None], cores: set[int]
) -> None:
    watched = Neighbours(CPU)
    crowd(watched, clock)
    with watched.step():
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == cores
    with pytest.raises(KeyError), watched.step():
        raise KeyError
    assert os.sched_getaffinity(0) == cores
    del watched
    assert all(where == cores for where in places().values())


def test_threads_that_take_turns_bring_their_teams(
    clock: Callable[[float, float], None], cores: set[int]
) -> None:
    watched = Neighbours(CPU)
    crowd(watched, clock)
    with watched.step():
        pass
    with ThreadPoolExecutor(1) as other:

        def work() -> int:
            torch.set_num_threads(2)
            with watched.step():
                return len(os.sched_getaffinity(0))

        assert other.submit(work).result() == 1
        assert all(where == cores for where in places().values())


def test_gatherings_take_cores_that_no_other_has(cores: set[int]) -> None:
    kept = KeptCores()
    taken = [kept.take(cores, thread) for thread in range(len(cores))]
    assert set(taken) == cores
    kept.give_back(taken[1], 1)
    assert kept.take(cores, len(cores)) == taken[1], "the one that is free"
    assert kept.take(cores, 0) == taken[0], "a thread's gatherings take turns"
    kept.give_back(taken[0], 0)
    assert kept.take(cores, 0) == taken[0], "one of them is still there"


def test_the_first_takes_the_core_it_runs_on(cores: set[int]) -> None:
    for core in cores:
        os.sched_setaffinity(0, {core})
        try:
            assert current_core() == core
            assert KeptCores().take(cores, 7) == core
        finally:
            os.sched_setaffinity(0, cores)


@pytest.mark.parametrize("told", [None, "1 (name", "1 (a) b) R 0"])
def test_where_no_core_is_told_any_is_taken(
    told: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "stat"
    if told is not None:
        file.write_text(told, "ascii")
    monkeypatch.setattr(neighbours, "PLACE", str(file))
    assert current_core() is None
    assert KeptCores().take({3, 5}, 7) == 3


def test_threads_that_are_gone_are_left_alone(
    cores: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    placed: list[int] = []
    place = os.sched_setaffinity

    def note(thread: int, where: set[int]) -> None:
        placed.append(thread)
        place(thread, where)

    monkeypatch.setattr(os, "sched_setaffinity", note)
    gathering = Gathering()
    thread = threading.Thread(target=gathering.keep)
    thread.start()
    thread.join()
    give_back_threads()
    # It is joined a moment before the system forgets it.
    assert eventually(lambda: thread.native_id not in places())
    gone = set(gathering._kept) - set(places())
    placed.clear()
    gathering.end()
    assert not gone & set(placed)


def test_a_user_s_own_choice_of_cores_stays(
    clock: Callable[[float, float], None], cores: set[int]
) -> None:
    watched = Neighbours(CPU)
    crowd(watched, clock)
    with watched.step():
        (kept,) = os.sched_getaffinity(0)
    (other,) = cores - {kept}
    os.sched_setaffinity(0, {other})
    with watched.step():
        assert os.sched_getaffinity(0) == {other}
    watched.rest()
    assert os.sched_getaffinity(0) == {other}


def test_a_team_that_came_later_is_let_go_too(
    clock: Callable[[float, float], None], cores: set[int]
) -> None:
    watched = Neighbours(CPU)
    crowd(watched, clock)
    give_back_threads()
    for threads in (2, 3):
        torch.set_num_threads(threads)
        with watched.step():
            torch.exp(torch.zeros(2**20))
    assert all(where == cores for where in places().values())


def test_two_threads_among_many_cores_stay_apart(
    clock: Callable[[float, float], None], cores: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    watched = Neighbours(CPU)
    crowd(watched, clock)
    assert watched.crowded
    assert not watched.gathered


@pytest.fixture
def always_crowded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others want the cores, as often as it is asked."""
    told = [0]

    def times() -> tuple[int, int]:
        told[0] += 40 * MILLISECOND
        return told[0], told[0]

    monkeypatch.setattr(neighbours, "thread_times", times)


def kept_to_one() -> bool:
    """Whether a thread is kept to one core just now."""
    return any(len(where) == 1 for where in places().values())


@pytest.mark.usefixtures("always_crowded")
@pytest.mark.parametrize("stops", [False, True])
def test_a_prefill_gathers_and_lets_go(
    stops: bool, cores: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    computing, told = [], []
    seen = Attended.row

    def row(*arguments: Any, **options: Any) -> Any:
        computing.append(kept_to_one())
        return seen(*arguments, **options)

    def on_layer(done: int) -> None:
        told.append(kept_to_one())
        if stops and done == 4:
            raise KeyError

    monkeypatch.setattr(Attended, "row", row)
    with suppress(KeyError):
        dkv.prefill(tiny_llm(), DOCUMENT, QUESTION, on_layer=on_layer)
    assert any(computing)
    assert not any(told), "what is called may start threads"
    assert not kept_to_one()


@pytest.mark.usefixtures("always_crowded")
@pytest.mark.parametrize("runs", [1, 4])
def test_answers_gather_step_by_step(
    runs: int, cores: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = tiny_llm()
    read = dkv.prefill(llm, DOCUMENT, QUESTION)
    kept, keep = [], Gathering.keep

    def note(gathering: Gathering) -> None:
        keep(gathering)
        kept.append(kept_to_one())

    monkeypatch.setattr(Gathering, "keep", note)
    methods = [dkv.SnapKV(capacity=24 + run) for run in range(runs)]
    for _ in dkv.compare_stream(llm, prefill=read, methods=methods, max_new_tokens=12):
        assert not kept_to_one()
    assert kept
    assert all(kept)
    assert eventually(lambda: asleep() == 0)


def test_where_threads_may_not_be_placed_the_work_goes_on(
    clock: Callable[[float, float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: int, where: set[int]) -> None:
        raise PermissionError(thread, where)

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    watched = Neighbours(CPU)
    crowd(watched, clock)
    with watched.step():
        assert watched.crowded
    watched.rest()


@pytest.mark.parametrize(
    ("ran", "waited"), [(30, 15), (850, 150)], ids=["too short to tell", "a seventh"]
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


def test_threads_that_take_turns_are_watched_together(
    clock: Callable[[float, float], None],
) -> None:
    watched = Neighbours(CPU)
    with ThreadPoolExecutor(1) as other:
        for _ in range(8):
            watched.look()
            other.submit(watched.look).result()
            clock(5, 5)
    assert watched.crowded


def test_a_thread_that_bears_the_number_of_one_that_is_gone_is_watched(
    clock: Callable[[float, float], None],
) -> None:
    watched = Neighbours(CPU)
    clock(5000, 5000)
    watched.look()
    clock(-4999, -4999)
    watched.look()
    clock(40, 40)
    watched.look()
    assert watched.crowded


def test_several_that_watch_share_one_team(clock: Callable[[float, float], None]) -> None:
    watching = [Neighbours(CPU) for _ in range(3)]
    for step in (0, 50):
        clock(step, step)
        for watched in watching:
            watched.look()
    assert all(watched.crowded for watched in watching)
    assert eventually(lambda: asleep() == 1)
    watching[0].rest()
    del watched, watching[1:]
    assert eventually(lambda: asleep() == 0)


def test_where_no_thread_can_be_started_the_work_goes_on(
    clock: Callable[[float, float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    watched = Neighbours(CPU)
    watched.look()
    clock(50, 50)
    monkeypatch.setattr(threading.Thread, "start", refuse)
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


@pytest.mark.parametrize("told", [None, "", "5 5", "a b c", "0 0 0"])
def test_a_system_that_does_not_tell_is_not_asked_again(
    told: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "schedstat"
    if told is not None:
        file.write_text(told, "ascii")
    monkeypatch.setattr(neighbours, "TIMES", str(file))
    watched = Neighbours(CPU)
    watched.look()
    for ran in (1, 100 * MILLISECOND):
        file.write_text(f"{ran} {ran} 1", "ascii")
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


def started(compute: Callable[[], object]) -> set[str]:
    """The threads that were started meanwhile and are still there."""
    before = set(os.listdir("/proc/self/task"))
    compute()
    return set(os.listdir("/proc/self/task")) - before


@pytest.mark.parametrize("end", ["give_back_threads", "compare"])
def test_a_threads_team_is_given_back(end: str) -> None:
    left: list[bool] = []

    def use() -> None:
        torch.exp(torch.zeros(2**20))

    def compare() -> None:
        dkv.compare(tiny_llm(), DOCUMENT, QUESTION, methods=[dkv.FullKV()], max_new_tokens=2)

    def work() -> None:
        torch.set_num_threads(2)
        team = started(use)
        {"give_back_threads": give_back_threads, "compare": compare}[end]()
        left.extend([len(team) == 1, not team & set(os.listdir("/proc/self/task"))])
        use()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert left == [True, True]
