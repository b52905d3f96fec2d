"""A model of which some layers see only a sliding window: receipts, bars and words say so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

import dynamickv as dkv
from app.components import base
from app.explore.live import LiveRun
from app.record import cards
from app.views.budgets import VIEW
from dynamickv.record.trace import KINDS, Retained, Run, Trace

SLIDING = [0, 1, 3, 4]
WINDOW = 31


def hybrid(trace: Trace) -> Trace:
    """The record as if those layers held only the last tokens, with every method."""
    length = trace.prompt.length

    def cut(run: Run) -> Run:
        mask = run.retained.unpack(trace.model.num_layers, length)
        mask[SLIDING] = np.arange(length) >= length - WINDOW
        budgets = [WINDOW if i in SLIDING else kept for i, kept in enumerate(run.budgets)]
        return replace(run, budgets=budgets, retained=Retained.pack(mask))

    model = replace(trace.model, sliding_layers=SLIDING)
    return replace(trace, model=model, runs=[cut(run) for run in trace.runs])


def test_the_receipt_counts_the_layers_that_can_be_compressed(trace: Trace) -> None:
    shown = hybrid(trace)
    (full, dynamic) = cards.cards(shown)
    assert full["chip"] == "keeps everything"
    assert dynamic["chip"] == "compressed at 26 of 26 layers, 4 slide"


def test_a_prompt_that_fits_is_said_to_fit_though_windows_slide(trace: Trace) -> None:
    shown = hybrid(trace)
    kept = replace(shown.runs[0], method="DynamicKV", parameters={"capacity": 5000})
    fits = replace(shown, runs=[shown.runs[0], kept])
    assert cards.cards(fits)[1]["chip"] == "nothing to compress: the prompt fits"
    assert cards.fits_notice(fits).startswith("Nothing to compress")


def test_the_same_is_said_while_it_runs(trace: Trace) -> None:
    shown = hybrid(trace)
    live = LiveRun(["FullKV", "DynamicKV"], "?", 4, shown.model.num_layers)
    for index, run in enumerate(shown.runs):
        live.add(
            dkv.Compressed(
                run=index,
                method=run.method,
                budgets=run.budgets,
                kv_bytes=run.kv_bytes,
                kept_fraction=run.kept_fraction,
                score_seconds=0.1,
                prune_seconds=0.1,
            )
        )
    assert live.cards[1]["chip"] == cards.cards(shown)[1]["chip"]


def test_bars_of_sliding_layers_are_pale_and_the_note_says_why(trace: Trace) -> None:
    figure = VIEW.render(hybrid(trace))
    assert "4 layers of 30 (pale) see only a sliding window" in figure.note
    solid = figure.plot.data[-1].marker.opacity
    assert solid[0] == 0.3
    assert solid[2] == 1
    assert "sliding" not in VIEW.render(trace).note


def test_layers_of_several_kinds_are_named(trace: Trace) -> None:
    kinds = ["full"] * trace.model.num_layers
    kinds[0], kinds[1], kinds[3] = "linear", "linear", "sliding"
    shown = replace(trace, model=replace(trace.model, layer_kinds=kinds))
    note = VIEW.render(shown).note
    assert "3 layers of 30 (pale): 2 linear attention, 1 sliding window." in note
    assert cards.cards(shown)[1]["chip"].endswith("of 27 layers, 3 are of other kinds")


def test_the_browser_names_the_kinds_that_the_record_knows() -> None:
    source = (Path(base.__file__).parent / "static" / "core.js").read_text("utf-8")
    words = source[source.index("KIND_WORDS") : source.index("};", source.index("KIND_WORDS"))]
    for kind, entry in KINDS.items():
        assert (f'{kind}: "{entry.words}"' in words) == (not entry.compressed)
