"""Tokens kept per layer: flat for SnapKV, the task's own shape for DynamicKV, and each update that
made it.
"""

from __future__ import annotations

import html
from collections import Counter

import plotly.graph_objects as go

from app.record.film import film_of
from app.record.words import run_names, window_tokens
from app.theme import method_style
from app.wording import count
from dynamickv.record.trace import KINDS, Run, Trace

from .base import Figure, Step, View, layer_bars

BAR_SPAN = 0.84
WINDOW_OPACITY = 0.45


def render(trace: Trace) -> Figure:
    """Horizontal bars, layer 0 on top; every method has its lane, its window part is hatched."""
    layers = list(range(trace.model.num_layers))
    height = max(420, 17 * len(layers) + 90)
    limit = axis_limit(trace)
    figure = layer_bars(len(layers), height, limit)
    lane = BAR_SPAN / max(len(trace.runs), 1)
    for index, (run, names) in enumerate(zip(trace.runs, run_names(trace.runs), strict=True)):
        offset = -BAR_SPAN / 2 + index * lane
        window = window_tokens(run, trace.prompt)
        sliding = list(trace.model.uncompressed)
        add_run(figure, run, names, window, layers, offset, lane * 0.9, sliding)
    return Figure(
        plot=figure,
        height=height,
        note=" ".join(filter(None, (scale_note(trace, limit), sliding_note(trace)))),
        steps=film(trace, limit),
        layer_axis="y",
        wide_limit=trace.prompt.length * 1.04 if trace.prompt.length > limit else None,
        film_limit=film_limit(trace, limit),
    )


def add_run(
    figure: go.Figure,
    run: Run,
    names: tuple[str, str],
    window: int,
    layers: list[int],
    offset: float,
    width: float,
    sliding: list[int],
) -> None:
    """Two bars per layer: the observation window (hatched) and what was chosen (solid or in the
    method's pattern).
    """
    style, label = method_style(names[0]), html.escape(names[1])
    window_part, chosen_part = split_budgets(run.budgets, window)
    common = {"y": layers, "orientation": "h", "offset": offset, "width": width, "meta": names[0]}
    figure.add_bar(
        **common,
        name=f"{label}, window",
        x=window_part,
        base=[0] * len(layers),
        marker={
            "color": style.light,
            "opacity": opacities(WINDOW_OPACITY, layers, sliding),
            "line": {"width": 0},
            "pattern": {"shape": "/", "fillmode": "replace", "size": 4, "solidity": 0.45},
        },
        customdata=run.budgets,
        hovertemplate="layer %{y} · " + label + "<br>observation window %{x}<extra></extra>",
    )
    figure.add_bar(
        **common,
        name=label,
        x=chosen_part,
        base=window_part,
        marker={
            "color": style.light,
            "opacity": opacities(0.35 if run.method == "FullKV" else 1, layers, sliding),
            "line": {"width": 0},
            "pattern": {"shape": style.pattern, "fillmode": "overlay", "size": 5, "solidity": 0.3},
        },
        customdata=run.budgets,
        hovertemplate="layer %{y} · " + label + "<br>%{customdata:,} tokens kept<extra></extra>",
    )


def split_budgets(budgets: list[int], window: int) -> tuple[list[int], list[int]]:
    """Window part and chosen part of each layer's budget."""
    window_part = [min(window, kept) for kept in budgets]
    return window_part, [kept - part for kept, part in zip(budgets, window_part, strict=True)]


def axis_limit(trace: Trace) -> float:
    """Room for the compressed methods; FullKV's bars may be longer than the axis, and the note
    says so.
    """
    compressed = [kept for run in trace.runs if run.method != "FullKV" for kept in run.budgets]
    return 1.08 * max(compressed or [trace.prompt.length])


def film_limit(trace: Trace, final_limit: float) -> float:
    """Room for whatever a compressed run holds while the prompt is read."""
    films = [steps for steps in film_of(trace) if steps]
    return max([final_limit, *(1.08 * max(map(max, steps)) for steps in films)])


def scale_note(trace: Trace, limit: float) -> str:
    """What the axis leaves out."""
    if trace.prompt.length <= limit or not any(run.method == "FullKV" for run in trace.runs):
        return ""
    tokens = count(trace.prompt.length, "token")
    return f"FullKV keeps all {tokens} in every layer: its bars go on past the edge."


def sliding_note(trace: Trace) -> str:
    """Which layers no method compresses."""
    others = trace.model.uncompressed
    if not others:
        return ""
    layers = f"{count(len(others), 'layer')} of {trace.model.num_layers} (pale)"
    if set(others.values()) == {"sliding"}:
        return f"{layers} see only a sliding window: no method compresses them."
    numbers = Counter(KINDS[kind].words for kind in others.values())
    named = ", ".join(f"{number} {words}" for words, number in numbers.items())
    return f"No method compresses {layers}: {named}."


def opacities(strong: float, layers: list[int], sliding: list[int]) -> float | list[float]:
    """How solid each layer's bar is; those of sliding-window layers are pale."""
    return [strong * (0.3 if layer in sliding else 1) for layer in layers] if sliding else strong


def film(trace: Trace, final_limit: float) -> list[Step]:
    """One step per update of the budgets, then the result: of a run that was added last with other
    settings, else DynamicKV's."""
    labelled = zip(trace.runs, run_names(trace.runs), strict=True)
    found = [(run, names[1]) for run, names in labelled if run.budget_history]
    if not found:
        return []
    run, label = found[-1]
    if label == run.method:  # nothing was added with other settings
        run, label = next((one for one in found if one[1] == "DynamicKV"), found[-1])
    window = window_tokens(run, trace.prompt)
    capacity = int(run.parameters["capacity"])
    total = (capacity - window) * trace.model.num_layers
    # One axis for all updates: one that follows each of them makes constant bars grow and shrink.
    widest = max(window + kept for update in run.budget_history for kept in update)
    limit = max(1.08 * widest, final_limit)
    steps = []
    for number, update in enumerate(run.budget_history, start=1):
        steps.append(
            Step(
                label=f"update {number} of {len(run.budget_history)}",
                note=f"{label}, after layer {len(update) - 1}: {count(sum(update), 'token')} "
                f"shared by {count(len(update), 'layer')} (budget {total:,})",
                **bars_at(trace, run, [window + kept for kept in update]),
                limit=limit,
            )
        )
    kept_total = sum(run.budgets) - window * trace.model.num_layers
    steps.append(
        Step(
            label="result",
            note=f"{label}: {count(kept_total, 'token')} chosen over {trace.model.num_layers} "
            f"layers (budget {total:,}), plus a window of {window}",
            **bars_at(trace, run, run.budgets),
            limit=limit,
        )
    )
    return steps


def bars_at(trace: Trace, moving: Run, budgets: list[int]) -> dict[str, list[list[float]]]:
    """All bars when `moving` holds these budgets; layers not seen yet are empty, other methods
    stay.
    """
    x: list[list[float]] = []
    base: list[list[float]] = []
    for run in trace.runs:
        window = window_tokens(run, trace.prompt)
        shown = budgets if run is moving else run.budgets
        window_part, chosen_part = split_budgets(shown, window)
        missing = [0] * (trace.model.num_layers - len(shown))
        x += [[*window_part, *missing], [*chosen_part, *missing]]
        base += [[0] * trace.model.num_layers, [*window_part, *missing]]
    return {"x": x, "base": base}


VIEW = View(key="budgets", title="Budgets", render=render)
