"""How far one answer follows another: the same tokens, and the same words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dynamickv.record.checks import YARDSTICK
from dynamickv.record.trace import Agreement, Run


def yardstick_of(runs: Sequence[Run]) -> Run | None:
    """FullKV's run, when there is one that ran to its end."""
    run = next((run for run in runs if run.method == YARDSTICK), None)
    return None if run is None or run.finish_reason == "cancelled" else run


def with_agreement(runs: Sequence[Run], first: int = 0) -> list[Run]:
    """The same runs, those from `first` on held against FullKV's; unchanged where it is not among
    them."""
    yardstick = yardstick_of(runs)
    if yardstick is None:
        return list(runs)
    compared = [replace(run, agreement=agreement(run, yardstick)) for run in runs[first:]]
    return [*runs[:first], *compared]


def agreement(run: Run, yardstick: Run) -> Agreement:
    """How far `run` follows `yardstick`."""
    ours, theirs = run.token_ids, yardstick.token_ids
    longest = max(len(ours), len(theirs), 1)
    same = [a == b for a, b in zip(ours, theirs, strict=False)]
    return Agreement(
        first_divergence=None
        if ours == theirs
        else next((i for i, equal in enumerate(same) if not equal), len(same)),
        token_match=1.0 if ours == theirs else sum(same) / longest,
        rouge_l=rouge_l(run.answer, yardstick.answer),
    )


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L F-measure over words, 0 to 1; 1 for equal texts."""
    ours, theirs = prediction.split(), reference.split()
    if ours == theirs:
        return 1.0
    return 2 * common_words(ours, theirs) / (len(ours) + len(theirs))


def common_words(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, one bit of a big integer per word of `first`.

    Answers may have thousands of words, on which the rouge library recurses too deeply.
    Source: Hyyrö 2004, bit-parallel LCS.
    """
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    every = (1 << len(first)) - 1
    row = every
    for word in second:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & every
    return len(first) - bin(row).count("1")
