"""What all commands take alike, and what was given: settings of methods, lists, files to write."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from dynamickv.methods import METHODS

SETTINGS: tuple[tuple[str, type, str, str], ...] = (
    ("--window-size", int, "N", "last prompt tokens, which score the others and are kept"),
    (
        "--kernel-size",
        int,
        "N",
        "neighbours that pool their scores, odd; H2O pools none, CAKE 5",
    ),
    ("--pooling", str, "max|avg", "by the largest of them or their mean"),
    ("--granularity", str, "kv_head|query_head", "heads that keep tokens of their own"),
    ("--r-max", float, "X", "most of a layer, in capacities; DynamicKV, ShiftKV, VoteKV"),
    ("--update-interval", int, "N", "layers between two updates of the budgets; DynamicKV"),
    ("--tau1", float, "X", "temperature of a layer's entropy; CAKE"),
    ("--tau2", float, "X", "temperature of a layer's variance; CAKE"),
    ("--gamma", float, "X", "weight of a position's variance; CAKE"),
    ("--alpha", float, "X", "share of a layer's budget that every head keeps; LAVa"),
    ("--context-size", int, "N", "last prompt tokens that are compared; ShiftKV, VoteKV"),
    ("--voted-share", float, "X", "part of the budget that goes by votes; VoteKV"),
    ("--voting-size", int, "N", "last prompt tokens that vote; VoteKV"),
    ("--smoothing", int, "N", "positions that average their votes, odd; VoteKV"),
    ("--reach", int, "N", "positions behind a place that its votes count for; VoteKV"),
)
"""What methods take besides a capacity: option, type, placeholder, explanation."""


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add `SETTINGS`; what is not given is each method's own default."""
    for option, number, metavar, explanation in SETTINGS:
        name = _attribute(option)
        parser.add_argument(
            option,
            type=number,
            metavar=metavar,
            help=f"{explanation} (default: {_default(name)})",
        )


def _default(name: str) -> Any:
    """DynamicKV's, or of what it has not, that of the first method that has it."""
    kinds = [METHODS["DynamicKV"], *METHODS.values()]
    return next(getattr(kind, name) for kind in kinds if hasattr(kind, name))


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What was given of `SETTINGS`, by parameter; None where nothing was."""
    return {name: getattr(options, name) for name in (_attribute(row[0]) for row in SETTINGS)}


def _attribute(option: str) -> str:
    return option[2:].replace("-", "_")


def listed(text: str) -> list[str]:
    """The names in a list with commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def with_options(sentence: str, options: argparse.Namespace) -> str:
    """What the engine says of its parameters, said of the options that were typed: --window-size
    for window_size."""
    for name in vars(options):
        if "_" in name:
            option = "--" + name.replace("_", "-")
            sentence = re.sub(rf"(?<![\w-]){name}(?!\w|\.\w)", option, sentence)
    subject, space, rest = sentence.partition(" ")
    for name in (subject, f"decode_{subject}"):
        if hasattr(options, name):
            return f"--{name.replace('_', '-')}{space}{rest}"
    return sentence


def output_file(name: str) -> Path:
    """The path of a file that can be written.

    Raises:
        ValueError: its folder does not exist, or it is a folder itself.
    """
    path = Path(name)
    if not path.resolve().parent.is_dir():
        raise ValueError(f"the folder of {name} does not exist; create it first")
    if path.is_dir():
        raise ValueError(f"{name} is a folder; give the name of a file in it")
    return path
