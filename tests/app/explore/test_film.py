"""The film of a run that is going on: events in, pictures out."""

from __future__ import annotations

from typing import Any

import dynamickv as dkv
from app.explore.film import AGAIN, SHOW_EVERY, Film
from tests.engine.tiny import DOCUMENT, QUESTION, tiny_llm

METHODS = [dkv.FullKV(), dkv.DynamicKV(capacity=24)]


def pictures() -> tuple[list[dict[str, Any]], dkv.Trace]:
    """All pictures of a run, one after every event that may have one, and its record."""
    film, now, shown = Film(METHODS), 0.0, []
    for event in dkv.compare_stream(
        tiny_llm(), DOCUMENT, QUESTION, methods=METHODS, max_new_tokens=2, watch=True
    ):
        now += SHOW_EVERY
        film.add(event)
        picture = film.picture(now)
        if picture is not None:
            shown.append(picture["film"])
        if isinstance(event, dkv.ComparisonFinished):
            trace = event.trace
    return shown, trace


def test_pictures_add_up_to_the_record() -> None:
    shown, trace = pictures()
    rows = {(row[0], row[1]): row for picture in shown for row in picture["rows"]}
    for index, run in enumerate(trace.runs):
        budgets = [rows[index, layer][2] for layer in range(trace.model.num_layers)]
        assert budgets == run.budgets
    assert all(rows[0, layer][5] == "" for layer in range(trace.model.num_layers))
    assert shown[-1]["read"]
    assert shown[-1]["layers"] == trace.model.num_layers
    for picture in shown:  # a layer is told to be read no later than what it keeps
        assert all(row[1] <= picture["layers"] for row in picture["rows"])


def test_any_picture_may_be_missed() -> None:
    shown, trace = pictures()
    for missing in range(len(shown)):
        seen = [picture for picture in shown if picture is not shown[missing]]
        rows = {(row[0], row[1]): row for picture in seen for row in picture["rows"]}
        assert rows[1, 0][2] == trace.runs[1].budgets[0]
        assert len(rows) == 2 * trace.model.num_layers
        assert any("opening" in picture for picture in seen)
    assert sum("opening" in picture for picture in shown) == AGAIN


def test_pictures_are_not_sent_faster_than_they_are_seen() -> None:
    film = Film(METHODS)
    events = dkv.compare_stream(
        tiny_llm(), DOCUMENT, QUESTION, methods=METHODS, max_new_tokens=2, watch=True
    )
    assert film.add(next(events))
    assert film.picture(1.0, at_once=True) is not None
    assert film.picture(1.0 + SHOW_EVERY / 2) is None
    assert film.picture(1.0 + SHOW_EVERY) is not None


def test_before_anything_is_read_every_layer_holds_the_whole_prompt() -> None:
    shown, trace = pictures()
    opening = shown[0]["opening"]
    assert opening["record"]["prompt"]["text"] == trace.prompt.text
    assert opening["looks"][1]["window"] == 8
    for run in opening["record"]["runs"]:
        assert run["budgets"] == [trace.prompt.length] * trace.model.num_layers
        assert run["retained"]["bits"] == ""
