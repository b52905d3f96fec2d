"""The queue: one at a time, fair, bounded, and honest about places."""

from __future__ import annotations

import threading
import time

import pytest

from app.serving.turns import LEFT, Ticket, Turns


def test_one_at_a_time_in_the_order_of_coming() -> None:
    turns = Turns()
    first, second = turns.join("a"), turns.join("b")
    assert first.wait(0)
    assert not second.wait(0)
    assert second.place().ahead == 1
    with first:
        pass
    assert second.wait(0)
    assert turns.counts() == {"running": 1, "waiting": 0}


def test_a_second_request_waits_for_everyone_s_first() -> None:
    turns = Turns()
    tickets = {name: turns.join(name[0]) for name in ("a1", "a2", "a3", "b1", "c1", "b2")}
    served = []
    while tickets:
        name = next(name for name, ticket in tickets.items() if ticket.wait(0))
        served.append(name)
        turns.leave(tickets.pop(name))
    assert served == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_no_two_ever_run_together() -> None:
    turns, running, most, done = Turns(most=200, per_session=200, per_address=200), [0], [0], []

    def work(number: int) -> None:
        with turns.join(f"s{number % 7}") as ticket:
            while not ticket.wait(0.5):
                pass
            running[0] += 1
            most[0] = max(most[0], running[0])
            time.sleep(0.001)
            running[0] -= 1
            done.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(done) == list(range(100))
    assert most == [1]
    assert turns.counts() == {"running": 0, "waiting": 0}


@pytest.mark.parametrize(
    ("limits", "sentence"),
    [
        ({"per_session": 2}, "You have 2 runs waiting"),
        ({"per_address": 2}, "Your network has 2 runs waiting"),
        ({"most": 2}, "2 runs are waiting already"),
    ],
)
def test_every_limit_is_one_sentence(limits: dict[str, int], sentence: str) -> None:
    turns = Turns(**limits)
    turns.join("a", "1.1.1.1").wait(0)
    turns.join("a", "1.1.1.1")
    with pytest.raises(ValueError, match=sentence):
        turns.join("a", "1.1.1.1")


def test_one_session_s_limit_leaves_room_for_others() -> None:
    turns = Turns(per_session=1)
    turns.join("a")
    turns.join("b")
    with pytest.raises(ValueError, match="You have 1"):
        turns.join("b")


def test_an_estimate_adds_up_what_is_before() -> None:
    turns = Turns()
    running = turns.join("a", expected=10.0)
    running.wait(0)
    turns.join("b", expected=5.0)
    place = turns.join("c").place()
    assert place.ahead == 2
    assert place.seconds == pytest.approx(15.0, abs=0.5)


def test_an_estimate_learns_from_finished_turns() -> None:
    turns = Turns()
    ticket = turns.join("a")
    assert turns.join("b").place().seconds is None
    with ticket:
        ticket.wait(0)
        time.sleep(0.05)
    waiting = [turns.join(name) for name in "cd"]
    seconds = waiting[1].place().seconds
    assert seconds is not None
    assert 0.05 <= seconds < 5


def test_leaving_the_queue_lets_the_others_move_up() -> None:
    turns = Turns()
    turns.join("a").wait(0)
    second, third = turns.join("b"), turns.join("c")
    with second:
        assert third.place().ahead == 2
    assert third.place().ahead == 1
    with pytest.raises(ValueError, match="has left the queue"):
        second.wait(0)


def test_a_ticket_nobody_asks_about_does_not_block_the_others() -> None:
    turns = Turns()
    lost, next_one = turns.join("a"), turns.join("b")
    assert not next_one.wait(0)
    lost.asked -= 31
    assert next_one.wait(0)


def test_the_end_of_a_session_stops_all_that_is_its_own() -> None:
    turns = Turns()
    mine: list[Ticket] = [turns.join("a"), turns.join("a")]
    other = turns.join("b")
    mine[0].wait(0)
    turns.stop("a")
    assert all(ticket.stop.is_set() for ticket in mine)
    assert not other.stop.is_set()


def test_an_error_gives_the_turn_back() -> None:
    turns = Turns()
    ticket = turns.join("a")
    assert ticket.wait(0)
    with pytest.raises(ZeroDivisionError), ticket:
        1 / 0  # noqa: B018
    assert turns.join("b").wait(0)


def test_work_sent_before_its_client_left_and_joining_after_is_stopped() -> None:
    turns = Turns()
    turns.left("a")
    assert turns.join("a").stop.is_set()
    assert not turns.join("b").stop.is_set()
    turns.back("a")
    assert not turns.join("a").stop.is_set()


def test_only_so_many_who_left_are_remembered() -> None:
    turns = Turns()
    for number in range(LEFT + 1):
        turns.left(f"s{number}")
    assert not turns.join("s0").stop.is_set()
    assert turns.join(f"s{LEFT}").stop.is_set()
