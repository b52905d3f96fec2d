"""What a card says of compression that went on while answering."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from app.form import Form, form_of
from app.record.cards import cards
from dynamickv.record.trace import Forgotten, Retained, Trace
from tests.app.pages import filled
from tests.app.synthetic import synthetic_trace

DECODING = {"budget": 96, "buffer": 4}


def forgetful(times: int = 2) -> Trace:
    """A record in which DynamicKV chose again, and kept fewer and fewer."""
    trace = synthetic_trace(tokens=300)
    length, heads = trace.prompt.length, trace.runs[1].retained.heads
    choices = []
    for number in range(times):
        position = 2 + 4 * number
        mask = np.ones((trace.model.num_layers, heads, length + position), bool)
        mask[:, :, : 100 * (number + 1)] = False
        mask[:, :, length] = False
        choices.append(Forgotten(position=position, retained=Retained.pack(mask), seconds=0.01))
    said = [f" word{number}" for number in range(8)]
    changed = replace(
        trace.runs[1],
        decoding=dict(DECODING),
        forgotten=choices,
        answer="".join(said),
        pieces=said,
        token_ids=list(range(8)),
        logprobs=[-0.2] * 8,
        decode_seconds=[0.05] * 8,
    )
    return replace(trace, runs=[trace.runs[0], changed, *trace.runs[2:]])


@pytest.mark.parametrize(
    ("times", "words"),
    [(1, "; chose again once, down to 96 tokens per layer"), (2, "; chose again 2 times, down to")],
)
def test_a_card_says_how_often_its_run_chose_again_and_down_to_what(times: int, words: str) -> None:
    full, own, *_ = cards(forgetful(times))
    assert words in own["finish"]
    assert "chose" not in full["finish"]
    assert "chose" not in cards(synthetic_trace(tokens=300))[1]["finish"]


def test_a_record_puts_its_decoding_back_into_the_form_and_the_form_asks_for_it() -> None:
    back = form_of(forgetful(), [])
    assert (back["decode_budget"], back["decode_buffer"]) == (96, 4)
    assert form_of(synthetic_trace(tokens=300), [])["decode_budget"] == 0
    job = Form.of(filled(decode_budget=96.0, decode_buffer=4)).request()
    assert job.decoding is not None
    assert (job.decoding.budget, job.decoding.buffer) == (96, 4)
    assert Form.of(filled(decode_buffer="?")).request().decoding is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"decode_budget": -1}, "decode_budget must lie between 1 and"),
        ({"decode_budget": 1.5}, "decode_budget must be a whole number, got 1.5"),
        ({"decode_budget": 64, "decode_buffer": 0}, "decode_buffer must lie between 1 and"),
        ({"decode_budget": 4}, "decoding budget 4: capacity must exceed window_size=8"),
        ({"decode_budget": 64, "methods": ["CAKE"]}, "CAKE does not choose again while answering"),
    ],
)
def test_what_cannot_go_on_while_answering_is_refused_in_a_sentence(
    changes: dict[str, object], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        Form.of(filled(**changes)).request()
