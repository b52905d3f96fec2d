"""The benchmark of a model that no single GPU holds: what it refuses, and that all of it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.beyond import SIZES, config_of, difference, main, parts_of, require_room

GIB = 2**30
LLAMA = config_of(tiny=False, layers=SIZES["num_hidden_layers"], longest=131072)


@pytest.mark.parametrize(("gpus", "room"), [(2, 139), (4, 79), (8, 79)])
def test_gpus_that_hold_the_model_and_the_prompt_are_taken(gpus: int, room: int) -> None:
    require_room(LLAMA, [room * GIB] * gpus, 131072)


@pytest.mark.parametrize(
    ("room", "length", "said"),
    [
        ([139] * 1, 32768, r"take \d+ GiB on each of 1 GPUs, and one has 139 .*use 2 of them"),
        ([79] * 2, 131072, r"80 layers and a prompt of 131,072 tokens .*use 4 of them"),
        (
            [139, 60],
            131072,
            r"one has 60 GiB free; use \d+ of them, or lower --layers or --lengths",
        ),
        ([16] * 8, 131072, r"use larger ones, or lower"),
        ([], 32768, r"there is no GPU here; --small"),
    ],
)
def test_too_few_or_too_small_gpus_are_one_sentence(
    room: list[int], length: int, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        require_room(LLAMA, [size * GIB for size in room], length)


def test_what_cannot_be_measured_ends_with_code_2_before_any_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for arguments in (["--small", "--gpus", "9"], *([] if torch.cuda.is_available() else [[]])):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, "--out", str(tmp_path)])
        assert stop.value.code == 2
        assert "error: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("layers", "parts"), [(8, 3), (80, 4), (2, 2)])
def test_parts_hold_every_layer_once_and_both_ends(layers: int, parts: int) -> None:
    stages = parts_of(layers, [torch.device("cpu")] * parts)
    assert [n for stage in stages for n in stage.layers] == list(range(layers))
    assert [stage.embeds for stage in stages] == [True] + [False] * (parts - 1)
    assert [stage.speaks for stage in stages] == [False] * (parts - 1) + [True]


def test_logits_that_are_no_numbers_are_no_match() -> None:
    right = torch.tensor([1.0, 2.0])
    assert difference([right], [right]) == (0.0, 1)
    assert not difference([right, right * torch.nan], [right, right])[0] <= 0.2


def test_a_tiny_model_in_parts_is_measured_on_both_paths(tmp_path: Path) -> None:
    main(["--small", "--lengths", "600", "--layers", "3", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "beyond-dry.json").read_text())["rows"]
    for path in ("captured step", "plain path"):
        steps = [row for row in rows if row["unit"] == "ms/token" and path in row["measure"]]
        assert ["FullKV" in row["measure"] for row in steps] == [True, False], path
        assert all(row["minimum"] <= row["value"] <= row["maximum"] for row in steps)
        assert any(f"DynamicKV(512) / FullKV, {path}" in row["measure"] for row in rows)
    by_bytes = [row["note"] for row in rows if "by the bytes" in row["note"]]
    assert 0 < float(by_bytes[0].split()[0]) < 1
    apart = [row["value"] for row in rows if "relative difference" in row["measure"]]
    assert len(apart) == 2
    assert max(apart) <= 0.05
