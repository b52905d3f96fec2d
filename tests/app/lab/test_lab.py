"""The Lab without a browser: measuring on a tiny model, stopping, going on, and what panels get."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from app.examples import Example
from app.lab import view_model as lab_model
from app.lab.handlers import FILE_NAME, LabHandlers, numbers
from app.lab.view_model import PANELS, recorded
from app.serving.model_host import ModelHost
from app.serving.turns import Turns
from tests.app.views.test_views import KNOWN_TRACES
from tests.engine.tiny import DOCUMENT, QUESTION, tiny_llm

NEEDLE = ("tiny", ["FullKV", "SnapKV", "DynamicKV"], "24, 48", "400, 500", 2, 1, 1)


@pytest.fixture(scope="module")
def examples() -> dict[str, Example]:
    return {
        str(n): Example(
            id=str(n), title=f"Text {n}", kind="report", question=QUESTION, capacity=24,
            max_new_tokens=4, document=DOCUMENT.replace("1911", str(1911 + n)), run_file=None,
        )
        for n in range(3)
    }  # fmt: skip


@pytest.fixture
def turns() -> Turns:
    return Turns()


@pytest.fixture
def handlers(
    examples: dict[str, Example],
    turns: Turns,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> LabHandlers:
    host = ModelHost("tiny", loader=lambda name: tiny_llm())
    texts = tmp_path_factory.mktemp("texts")
    for name in "abc":
        (texts / f"{name}.txt").write_text(DOCUMENT + name)
    own = {"a": {"find a fact": QUESTION, "complete code": "Write the next line."}}
    (texts / "questions.json").write_text(json.dumps(own))
    return LabHandlers(host, examples.values(), turns, folder=tmp_path / "kept", task_folder=texts)


def last(steps: list[Any]) -> tuple[Any, Any]:
    """The last status and the last panel."""
    panels = [json.loads(json.dumps(step[1])) for step in steps if "figure" in (step[1] or {})]
    return steps[-1][0], panels[-1] if panels else None


def check_panel(panel: dict[str, Any]) -> None:
    """What the browser relies on."""
    json.dumps(panel, allow_nan=False)
    assert panel["source"]
    assert {trace["type"] for trace in panel["figure"]["data"]} <= KNOWN_TRACES
    assert panel["figure"]["height"] == panel["figure"]["layout"]["height"]
    for table in panel["tables"]:
        assert table["caption"]
        assert len({len(line) for line in table["lines"]}) == 1


def test_a_grid_is_measured_with_progress_estimate_and_the_papers_row(
    handlers: LabHandlers,
) -> None:
    steps = list(handlers.needle(None, *NEEDLE))
    status, panel = last(steps)
    check_panel(panel)
    assert status["message"] == "Done."
    assert [s[0]["message"] for s in steps[1:-1]] == [f"Measured {n} of 4 cells" for n in range(5)]
    assert all("left" in step[0]["detail"] for step in steps[2:-1])
    # FullKV stands in both columns, the others have one heatmap a capacity.
    # Each has a second trace, grey, for what FullKV itself does not find.
    assert len(panel["figure"]["data"]) == 12
    assert panel["tables"][0]["lines"][1][0].startswith("paper: Mistral-7B")
    assert [line[0] for line in panel["tables"][0]["lines"][2:]] == [
        "here, capacity 24",
        "here, capacity 48",
    ]


def test_a_grid_says_how_long_it_will_take_before_it_is_measured(
    host: ModelHost, example: Example, tmp_path: Path
) -> None:
    lab = LabHandlers(host, [example], Turns(), tmp_path)

    def seconds(**changes: Any) -> float:
        form = {"methods": ["SnapKV"], "capacities": "24", "lengths": "512", "depths": 3}
        form |= {"samples": 1, "needles": 1} | changes
        return float(lab.needle_time(*form.values())["note"].split()[2])

    assert seconds(samples=8) == pytest.approx(8 * seconds(), rel=0.2)
    assert seconds(methods=["SnapKV", "H2O"]) > 1.5 * seconds()
    assert lab.needle_time(["SnapKV"], "?", "512", 3, 1, 1)["note"] == ""


def test_a_stopped_grid_goes_on_where_it_was(handlers: LabHandlers) -> None:
    steps = handlers.needle(None, *NEEDLE)
    seen = []
    for step in steps:
        seen.append(step)
        if step[0]["message"] == "Measured 2 of 4 cells":
            handlers.stop(None)
    assert last(seen)[0]["message"].startswith("Stopped: what was measured is kept")
    again = [step[0]["message"] for step in handlers.needle(None, *NEEDLE)]
    assert again[1:-1] == [f"Measured {n} of 2 cells" for n in range(3)]
    assert [step[0]["message"] for step in handlers.needle(None, *NEEDLE)][1:] == [
        "All is measured",
        "Done.",
    ]


def test_a_sweep_draws_curves_and_leaves_nothing_on_disk(
    handlers: LabHandlers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    steps = list(handlers.sweep(None, DOCUMENT, QUESTION, "tiny", ["H2O", "DynamicKV"], 4))
    status, panel = last(steps)
    check_panel(panel)
    assert status["message"] == "Done."
    assert len(panel["figure"]["data"]) == 8
    assert panel["csv"]["text"].startswith("method,capacity,token_match")
    assert list(tmp_path.iterdir()) == []


def test_tasks_say_how_far_budgets_follow_them(handlers: LabHandlers) -> None:
    steps = list(handlers.tasks(None, "tiny", "DynamicKV", 24))
    status, panel = last(steps)
    check_panel(panel)
    assert status["message"] == "Done."
    [said] = panel["said"]
    assert said.startswith("Another task on the same document moves ")
    distances = panel["tables"][0]["lines"]
    assert distances[0][0] == "DynamicKV, 3 documents"
    assert distances[1][0] == "other task, same document"
    assert distances[1][1] in said
    assert steps[1][0]["message"] == "Measured 0 of 12 questions"
    heatmap = panel["figure"]["data"][-1]
    assert heatmap["type"] == "heatmap"
    assert [len(heatmap["z"]), len(heatmap["z"][0])] == [5, 6]
    # Another capacity is measured beside the first and not mixed with it.
    _, wider = last(list(handlers.tasks(None, "tiny", "DynamicKV", 40)))
    assert sum(map(sum, wider["figure"]["data"][-1]["z"])) > sum(map(sum, heatmap["z"])) * 1.3


SCORED = ("tiny", FILE_NAME, ["FullKV", "SnapKV"], "24, 48", 2)


@pytest.fixture
def examples_file(tmp_path: Path) -> Path:
    """Three examples of one task, as Gradio leaves an upload."""
    (tmp_path / "upload").mkdir()
    file = tmp_path / "upload" / "trec.jsonl"
    row = {"context": DOCUMENT, "input": QUESTION, "answers": ["Who"], "all_classes": ["Who", "X"]}
    file.write_text("".join(json.dumps({**row, "_id": str(n)}) + "\n" for n in range(3)))
    return file


def test_uploaded_examples_are_scored_and_nothing_of_them_is_kept(
    handlers: LabHandlers, examples_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    steps = list(handlers.longbench(None, str(examples_file), *SCORED))
    status, panel = last(steps)
    check_panel(panel)
    assert status["message"] == "Done."
    assert [s[0]["message"] for s in steps[1:-1]] == [
        f"Measured {n} of 2 examples" for n in range(3)
    ]
    assert all("left" in step[0]["detail"] for step in steps[2:-1])
    assert [line.split(",")[:4] for line in panel["csv"]["text"].splitlines()[1::2]] == [
        ["FullKV", "all", "trec", "2"],
        ["SnapKV", "24", "trec", "2"],
        ["SnapKV", "48", "trec", "2"],
    ]
    assert not examples_file.exists()
    assert list((tmp_path / "temporary").iterdir()) == []
    assert not (tmp_path / "kept").exists()


def test_scoring_is_stopped_between_examples(handlers: LabHandlers, examples_file: Path) -> None:
    seen = []
    for step in handlers.longbench(None, str(examples_file), *SCORED):
        seen.append(step)
        if step[0]["message"] == "Measured 1 of 2 examples":
            handlers.stop(None)
    assert seen[-2][0]["message"] == "Measured 1 of 2 examples"
    assert seen[-1][0]["message"].startswith("Stopped")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({1: "Nothing"}, "no task 'Nothing'"),
        ({1: ["trec"]}, "no task"),
        ({2: ["Nothing"]}, "no method 'Nothing'"),
        ({3: "many"}, "got 'many'"),
        ({4: 21}, "Examples must lie between 1 and 20, got 21"),
    ],
)
def test_a_file_that_is_refused_is_deleted(
    handlers: LabHandlers, examples_file: Path, changes: dict[int, Any], words: str
) -> None:
    fields = [changes.get(place, value) for place, value in enumerate(SCORED)]
    status, panel = last(list(handlers.longbench(None, str(examples_file), *fields)))
    assert status["state"] == "error"
    assert words in status["message"]
    assert panel is None
    assert not examples_file.exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({1: []}, "No method to measure"),
        ({1: ["Nothing"]}, "no method 'Nothing'"),
        ({1: "FullKV"}, "list of names"),
        ({2: "64, many"}, "got '64, many'"),
        ({2: ""}, "Capacity takes 1 to 12 whole numbers"),
        ({3: "90000"}, "lower the length to"),
        ({3: " ".join(map(str, range(100, 113)))}, "Length takes 1 to 12"),
        ({4: 99}, "Depths must lie between 1 and 21, got 99"),
        ({5: 0}, "Samples must lie"),
        ({6: "<img>"}, "Needles must be a whole number"),
        ({0: "someone/model"}, "Unknown model"),
    ],
)
def test_bad_grids_are_refused_in_one_sentence(
    handlers: LabHandlers, changes: dict[int, Any], words: str
) -> None:
    fields = [changes.get(place, value) for place, value in enumerate(NEEDLE)]
    status, panel = last(list(handlers.needle(None, *fields)))
    assert status["state"] == "error"
    assert words in status["message"]
    field = "capacity" if 2 in changes else "length" if "Length takes" in words else ""
    assert status["field"] == field
    assert panel is None


def test_a_sweep_without_a_document_is_refused(handlers: LabHandlers) -> None:
    status, _ = last(list(handlers.sweep(None, " ", QUESTION, "tiny", ["SnapKV"], 4)))
    assert status["state"] == "error"
    assert "document" in status["message"]


def test_stopping_while_the_prompt_is_read_leaves_the_page_usable(
    handlers: LabHandlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    class AtOnce(threading.Event):
        def is_set(self) -> bool:
            return True

    monkeypatch.setattr("app.lab.handlers.measure.threading.Event", AtOnce)
    steps = list(handlers.sweep(None, DOCUMENT, QUESTION, "tiny", ["SnapKV"], 4))
    assert steps[-1][0]["message"] == "Stopped."
    assert steps[-1][2]["interactive"] is True


@pytest.mark.parametrize("kind", PANELS)
def test_nothing_recorded_says_what_to_do(kind: str, tmp_path: Path) -> None:
    assert recorded(kind, tmp_path)["source"] == lab_model.NOTHING
    (tmp_path / f"{kind}.json").write_text('{"summary": [{"method": 3}], "circumstances": {}}')
    assert recorded(kind, tmp_path)["source"] == lab_model.NOTHING


@pytest.mark.parametrize("kind", PANELS)
def test_what_is_recorded_is_shown_with_its_circumstances(kind: str) -> None:
    panel = recorded(kind)
    if not (lab_model.ASSETS / "evidence" / f"{kind}.json").is_file():
        pytest.skip(f"{kind} is not recorded")
    check_panel(panel)
    assert panel["source"].startswith("Recorded 20")
    assert ("qwen2.5-coder-0.5b" if kind == "needle" else "smollm2-135m") in panel["source"]


def test_longbench_has_the_papers_rows_and_a_file() -> None:
    line: dict[str, Any] = {
        "method": "DynamicKV", "capacity": 64, "kept_fraction": 0.1, "kv_bytes": 10,
        "tasks": {"qasper": {"score": 0.2, "interval": [0.1, 0.3], "examples": 20}},
        "average": 0.2, "interval": [0.1, 0.3],
        "over_snapkv": {"mean": -0.1, "interval": [-0.2, -0.05]},
    }  # fmt: skip
    full = {**line, "method": "FullKV", "capacity": None, "over_snapkv": None}
    panel = lab_model.longbench_panel([full, line], "now")
    check_panel(panel)
    assert panel["said"] == ["DynamicKV beside SnapKV: behind at 64 (-10.0 points)."]
    alone = {**line, "over_snapkv": {"mean": -0.1, "interval": [-0.1, -0.1], "pairs": 1}}
    assert lab_model.longbench_panel([full, alone], "now")["said"] == [
        "DynamicKV beside SnapKV: compared by too few trials at 64."
    ]
    assert [line[0] for line in panel["tables"][0]["lines"][-2:]] == [
        "paper: InternLM-2.5-7B-Chat-1M, 512",
        "here: 1 task, 64",
    ]
    assert "qasper" in panel["csv"]["text"]


def test_numbers_are_read_in_any_order() -> None:
    assert numbers("capacity", "128, 64 64") == [64, 128]


def test_others_go_between_two_steps_of_a_measurement(handlers: LabHandlers, turns: Turns) -> None:
    steps = handlers.needle(None, *NEEDLE)
    for step in steps:
        if step[0]["message"] == "Measured 1 of 4 cells":
            break
    with turns.join("somebody else") as ticket:
        assert ticket.wait(0)
        waits = next(steps)[0]["message"]
    assert waits == "Waiting for your turn: 1 run before yours"
    assert list(steps)[-1][0]["message"] == "Done."


def test_a_borrowed_gpu_is_not_held_for_a_measurement(
    handlers: LabHandlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    status, panel = last(list(handlers.needle(None, *NEEDLE)))
    assert "python -m dynamickv needle" in status["message"]
    assert panel is None
