"""Nothing measured is lost: torn lines, full disks, several parts."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from dynamickv.evaluate.journal import Journal, write_whole


def test_lines_come_back_in_order(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a.jsonl")
    assert journal.read() == []
    for number in range(3):
        journal.append({"n": number, "text": "é\nü"})
    assert [row["n"] for row in Journal(tmp_path / "a.jsonl").read()] == [0, 1, 2]


@pytest.mark.parametrize("kept", [1, 7, 12])
def test_a_torn_last_line_is_left_out_and_then_cut_off(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "a.jsonl"
    Journal(path).append({"n": 0})
    with open(path, "ab") as file:
        file.write(b'{"n": 1, "text": "half'[:kept])
    assert Journal(path).read() == [{"n": 0}]
    Journal(path).append({"n": 2})
    assert Journal(path).read() == [{"n": 0}, {"n": 2}]


def test_a_last_line_that_only_lacks_its_end_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": 0}\n{"n": 1}')
    assert len(Journal(path).read()) == 2
    Journal(path).append({"n": 2})
    assert [row["n"] for row in Journal(path).read()] == [0, 1, 2]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": 0}\n{"n": \n{"n": 2}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: no JSON object"):
        Journal(path).read()


def test_every_process_writes_its_part_and_reads_all(tmp_path: Path) -> None:
    path = tmp_path / "run[1].jsonl"
    for rank in (0, 2, 10):
        Journal(path, rank).append({"rank": rank})
    (tmp_path / "run[1].notes.jsonl").write_text("not a part")
    (tmp_path / "run[1].5.json").write_text("not a part")
    assert [row["rank"] for row in Journal(path, 1).read()] == [0, 2, 10]
    assert (tmp_path / "run[1].2.jsonl").is_file()


@pytest.mark.parametrize("first_bytes", [0, 6])
def test_a_full_disk_leaves_earlier_lines_intact_and_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first_bytes: int
) -> None:
    path = tmp_path / "a.jsonl"
    journal = Journal(path)
    journal.append({"n": 0})
    write, calls = os.write, []

    def full(descriptor: int, content: bytes) -> int:
        calls.append(content)
        if first_bytes and len(calls) == 1:
            return write(descriptor, content[:first_bytes])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        journal.append({"n": 1})
    assert caught.value.filename == str(path)
    monkeypatch.undo()
    assert path.read_bytes() == b'{"n": 0}\n'
    journal.append({"n": 1})
    assert [row["n"] for row in journal.read()] == [0, 1]


def test_a_file_that_is_written_whole_is_the_old_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    write_whole(path, "old")

    def crash(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
