"""Whether DynamicKV is ahead of SnapKV, in sentences that say no more than the trials do."""

from __future__ import annotations

from collections.abc import Sequence

from dynamickv.evaluate.summary import YARDSTICK, Row

FEWEST = 20
"""Paired trials below which no method is called ahead or behind: a bootstrap over fewer says too
little."""


def standing(summary: Sequence[Row], field: str) -> list[str]:
    """One sentence per capacity: how DynamicKV stands to SnapKV, which shares the budget evenly.
    Below `FEWEST` trials it says no more than their number.

    Args:
        field: "exact" of a needle grid or "average" of LongBench.
    """
    said = []
    unit = " %" if field == "exact" else ""  # of values found; LongBench's scores have no unit
    for row in summary:
        gain = row["over_snapkv"]
        if row["method"] != "DynamicKV" or gain is None:
            continue
        pairs = _pairs(row)
        if pairs < FEWEST:
            said.append(
                f"Capacity {row['capacity']}: {pairs} of at least {FEWEST} trials, too few to tell "
                "DynamicKV from SnapKV."
            )
            continue
        low, high = gain["interval"]
        even = next(
            (r for r in summary if (r["method"], r["capacity"]) == (YARDSTICK, row["capacity"])),
            row,
        )
        share = row["kv_bytes"] / even["kv_bytes"]
        size = f" with {share:.2f} of its bytes" if abs(share - 1) >= 0.01 else ""
        verdict = "ahead of" if low > 0 else "behind" if high < 0 else "not told apart from"
        said.append(
            f"Capacity {row['capacity']}: DynamicKV has {100 * row[field]:.1f}{unit}, "
            f"{100 * gain['mean']:+.1f} points to SnapKV "
            f"(95 % interval {100 * low:+.1f} to {100 * high:+.1f}): {verdict} it{size}."
        )
    return said


def headline(summary: Sequence[Row]) -> str:
    """All capacities in one sentence, without intervals, which the tables have; empty where
    nothing was compared with SnapKV.
    """
    groups: dict[str, list[str]] = {}
    for row in summary:
        gain = row["over_snapkv"]
        if row["method"] != "DynamicKV" or gain is None:
            continue
        low, high = gain["interval"]
        few = _pairs(row) < FEWEST
        verdict = "ahead" if low > 0 else "behind" if high < 0 else "not told apart"
        verdict = "compared by too few trials" if few else verdict
        points = "" if few else f" ({100 * gain['mean']:+.1f} points)"
        groups.setdefault(verdict, []).append(f"{row['capacity']}{points}")
    said = "; ".join(f"{verdict} at {_listed(sizes)}" for verdict, sizes in groups.items())
    return f"DynamicKV beside SnapKV: {said}." if said else ""


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _pairs(row: Row) -> int:
    """Trials that a difference to SnapKV rests on. Summaries written before pairs were counted have
    a grid's trials or a task's examples."""
    if "pairs" in row["over_snapkv"]:
        return int(row["over_snapkv"]["pairs"])
    if "trials" in row:
        return int(row["trials"])
    return sum(task["examples"] for task in row["tasks"].values())
