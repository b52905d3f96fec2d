"""Tables of the evidence on three models: what they count, over what, and of which journals."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks import evidence_tables
from benchmarks.evidence_tables import FEWEST, section
from dynamickv.evaluate.journal import Journal

SETTINGS = {"experiment": "needle", "seed": 1}


def run_of(method: str, capacity: int | None) -> dict[str, Any]:
    return {
        "method": method,
        "parameters": {} if capacity is None else {"capacity": capacity},
        "exact": True,
        "fuzzy": 1.0,
        "kept_fraction": 1.0,
        "kv_bytes": 48 * 1024 * (capacity or 1000),
        "kv_bytes_full": 1,
    }


FULL = [run_of("FullKV", None)]
ALL = [*FULL, *(run_of(name, size) for name in ("SnapKV", "VoteKV") for size in (64, 128))]


def write(journal: Journal, runs: list[dict[str, Any]], length: int = 1024) -> None:
    """The first line and three prompts."""
    journal.append({"settings": SETTINGS})
    for sample in range(3):
        unit = {"length": length, "depth": 0.5, "sample": sample}
        journal.append({"unit": unit, "expected": ["7"], "runs": runs})


def tables_of(folder: Path) -> tuple[list[str], dict[str, Any] | None]:
    """What `write` makes of journals in folder / "qwen": tables, and the needle picture."""
    (folder / "qwen" / "about.json").write_text("{}", "utf-8")
    packed, target = folder / "evidence.tar.gz", folder / "target"
    with tarfile.open(packed, "w:gz") as archive:
        archive.add(folder / "qwen", "journals/qwen")
    target.mkdir()
    evidence_tables.write(packed, folder / "unpacked", target)
    picture = target / "needle.json"
    record = json.loads((target / "models.json").read_text("utf-8"))
    return evidence_tables.section(record), (
        json.loads(picture.read_text("utf-8")) if picture.is_file() else None
    )


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    (tmp_path / "qwen").mkdir()
    return Journal(tmp_path / "qwen" / "needle.jsonl")


def test_journals_without_a_prompt_make_no_tables(tmp_path: Path, journal: Journal) -> None:
    journal.append({"settings": SETTINGS})
    (tmp_path / "qwen" / "ruler.jsonl").touch()
    assert tables_of(tmp_path) == ([], None)


def test_of_a_journal_that_was_cut_off_the_whole_prompts_count(
    tmp_path: Path, journal: Journal
) -> None:
    write(journal, ALL)
    journal.path.write_bytes(journal.path.read_bytes()[:-40])
    (told, table), picture = tables_of(tmp_path)
    assert "2 prompts (1,024 tokens)" in told
    assert "SnapKV" in table
    assert picture is not None


def test_what_any_process_measured_makes_the_picture(tmp_path: Path, journal: Journal) -> None:
    for rank in (1, 2):
        write(Journal(journal.path, rank), ALL)
    _, picture = tables_of(tmp_path)
    assert picture is not None
    assert picture["settings"] == {**SETTINGS, "model": "qwen2.5-coder-0.5b"}


def test_a_capacity_that_only_later_cells_have_gets_its_row(
    tmp_path: Path, journal: Journal
) -> None:
    write(journal, FULL)
    write(journal, ALL, length=2048)
    (_, table), _ = tables_of(tmp_path)
    assert [line.split("|")[2:4] for line in table.splitlines()[2:]] == [
        [" 64 ", " 64.0 "],
        [" 128 ", " 128.0 "],
    ]


def test_a_picture_of_unknown_settings_is_refused(tmp_path: Path, journal: Journal) -> None:
    write(journal, ALL)
    journal.path.write_bytes(journal.path.read_bytes().split(b"\n", 1)[1])
    with pytest.raises(ValueError, match=r"no qwen/needle\.jsonl in .* says its settings"):
        tables_of(tmp_path)


def run(method: str, capacity: int | None, scores: list[float]) -> dict[str, Any]:
    return {
        "method": method,
        "capacity": capacity,
        "granularity": "kv_head",
        "scores": scores,
        "kv_bytes": 1024,
    }


def test_questions_about_one_text_go_together() -> None:
    names = ["long", "long", "long", "short"]
    cells = [
        {
            "cell": way,
            "prompts": 4,
            "documents": names,
            "runs": [run("FullKV", None, [1, 1, 1, 1]), run("SnapKV", 64, [0, 0, 0, found])],
        }
        for way, found in (("first", 0), ("blind", 0), ("anew", 1))
    ]
    told, table = section({"parts": [{"model": "qwen", "part": "turns", "cells": cells}]})
    assert "4 questions about 2 texts" in told
    row = table.splitlines()[-1]
    assert "| 0.0 | 0.0 | 50.0 | +50.0 (+0.0 to +100.0) |" in row


def test_a_part_whose_cells_do_not_count_is_named_and_few_prompts_get_no_table() -> None:
    def part(answered: int) -> dict[str, Any]:
        full = [1.0] * answered + [0.0] * 3 * FEWEST
        runs = [run("FullKV", None, full), run("SnapKV", 64, full), run("VoteKV", 64, full)]
        cell = {"cell": "niah_multikey_3", "prompts": len(full), "runs": runs}
        return {"model": "qwen", "part": "multikey-chat", "cells": [cell]}

    few = section({"parts": [part(FEWEST - 1)]})
    assert len(few) == 1
    assert "The same in the chat template" in few[0]
    assert "not counted: niah_multikey_3" in few[0]
    enough = section({"parts": [part(FEWEST)]})
    assert f"the {FEWEST} of Qwen2.5-Coder-0.5B's prompts" in enough[1]
    assert "| SnapKV | +0.0 (+0.0 to +0.0) |" in enough[2]
