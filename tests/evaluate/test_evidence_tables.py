"""Tables of the evidence on three models: what they count, and over what."""

from __future__ import annotations

from typing import Any

from benchmarks.evidence_tables import FEWEST, section


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
