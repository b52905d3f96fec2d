"""The benchmark of processes that share an evaluation: what counts as the same results, and which
figures of earlier commands stay."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.report import Row, publish
from benchmarks.spread import found, journal, main, share_equal, with_earlier

ROW = {"unit": {"sample": 1}, "prompt_tokens": 9, "runs": [{"answer": "a"}], "seconds": 1.0}


def written(folder: Path, *rows: dict[str, object]) -> dict[str, str]:
    """What is found of a needle's journal with those rows."""
    folder.mkdir()
    for row in ({"settings": {}}, *rows):
        journal("needle", folder).append(row)
    return found("needle", folder)


def test_the_same_results_differ_in_nothing_but_their_times(tmp_path: Path) -> None:
    one = written(tmp_path / "one", ROW, ROW | {"unit": {"sample": 2}})
    again = written(
        tmp_path / "again", ROW | {"unit": {"sample": 2}}, ROW | {"prefill_seconds": 2.0}
    )
    assert share_equal(one, again) == 1


@pytest.mark.parametrize(
    ("rows", "share"),
    [
        ([ROW | {"runs": [{"answer": "b"}]}], 0),
        ([ROW | {"prompt_tokens": 8}], 0),
        ([], 0),
        ([ROW, ROW | {"unit": {"sample": 3}}], 0),
        ([ROW], 0.5),
    ],
    ids=["another answer", "another prompt", "nothing", "a unit too many", "a unit lacks"],
)
def test_results_that_differ_are_told(
    rows: list[dict[str, object]], share: float, tmp_path: Path
) -> None:
    one = written(tmp_path / "one", ROW, ROW | {"unit": {"sample": 2}})
    assert share_equal(one, written(tmp_path / "other", *rows)) == share


def test_no_results_are_not_the_same_results() -> None:
    assert share_equal({}, {}) == 0


def test_figures_of_the_same_machine_and_day_stay_beside_new_ones(tmp_path: Path) -> None:
    where = {"processor": "a", "cores": "2", "date": "2026-01-01", "load": "0.1"}
    publish("spread", where, [Row("a", 1), Row("b", 2, minimum=1, maximum=3)], tmp_path)
    later = where | {"load": "5.0"}
    rows = with_earlier(tmp_path / "spread.json", later, [Row("a", 9), Row("c", 3)])
    assert rows == [Row("b", 2, minimum=1, maximum=3), Row("a", 9), Row("c", 3)]
    other = later | {"date": "2026-01-02"}
    assert with_earlier(tmp_path / "spread.json", other, [Row("c", 3)]) == [Row("c", 3)]
    assert with_earlier(tmp_path / "none.json", where, [Row("c", 3)]) == [Row("c", 3)]


@pytest.mark.parametrize(
    "parts", ["needle,large", *([] if torch.cuda.device_count() > 1 else ["model"])]
)
def test_parts_that_cannot_be_measured_end_with_code_2(
    parts: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--parts", parts, "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
