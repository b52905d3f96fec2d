"""Capacity sweeps: agreement, divergence and size of every method over the capacity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from app.theme import method_style

from .base import Figure, blank_figure

PANELS = (
    ("token_match", "Same tokens", 100.0, " %", "linear"),
    ("rouge_l", "ROUGE-L", 1.0, "", "linear"),
    ("kl_mean", "KL, nats", 1.0, "", "linear"),
    ("kv_bytes", "KV MiB", 2.0**-20, "", "log"),
)
HEIGHT = 860


def cells(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What a click on every point opens: the run of that method at that capacity."""
    methods = list(dict.fromkeys(line["method"] for line in lines))
    found = []
    for panel, (field, title, factor, suffix, _) in enumerate(PANELS):
        for number, method in enumerate(methods):
            held = [line for line in lines if line["method"] == method]
            for place, line in enumerate(held):
                value = f"{title} {factor * line[field]:.4g}{suffix}"
                size = line["capacity"]
                found.append(
                    {
                        "at": [panel * len(methods) + number, place],
                        "words": f"{method}, capacity {size:,}: {value}",
                        "open": {"method": method, "capacity": size},
                    }
                )
    return found


def render(lines: Sequence[Mapping[str, Any]]) -> Figure:
    """Four charts, one above the other, over the same logarithmic capacity."""
    figure = blank_figure(
        HEIGHT,
        margin={"l": 70, "r": 12, "t": 34, "b": 48},
        legend={"orientation": "h", "y": 1.01, "yanchor": "bottom", "x": 0},
    )
    methods = list(dict.fromkeys(line["method"] for line in lines))
    sizes = sorted({line["capacity"] for line in lines})
    for place, (field, title, factor, suffix, kind) in enumerate(PANELS):
        end = "" if place == 0 else str(place + 1)
        last = place == len(PANELS) - 1
        top = 1 - place / len(PANELS)
        figure.update_layout(
            {
                f"xaxis{end}": {
                    "anchor": f"y{end}",
                    "matches": None if place == 0 else "x",
                    "type": "log",
                    "tickvals": sizes,
                    "ticktext": [f"{size:,}" for size in sizes],
                    "showticklabels": last,
                    "title": {"text": "Capacity (budget, tokens per layer)" if last else ""},
                    "fixedrange": True,
                    "zeroline": False,
                },
                f"yaxis{end}": {
                    "anchor": f"x{end}",
                    "domain": [top - 0.21, top],
                    "title": {"text": title, "standoff": 4},
                    "type": kind,
                    "ticksuffix": suffix,
                    "fixedrange": True,
                    "zeroline": False,
                    **({"rangemode": "tozero"} if kind == "linear" else {}),
                },
            }
        )
        for method in methods:
            style = method_style(method)
            held = [line for line in lines if line["method"] == method]
            figure.add_scatter(
                x=[line["capacity"] for line in held],
                y=[round(factor * line[field], 6) for line in held],
                xaxis=f"x{end}",
                yaxis=f"y{end}",
                mode="lines+markers",
                name=method,
                meta=method,
                showlegend=place == 0,
                legendgroup=method,
                line={"color": style.light, "dash": style.dash, "width": 2},
                marker={"color": style.light, "symbol": style.symbol, "size": 7},
                hovertemplate=f"{method} at %{{x:,}}<br>%{{y:.4g}}{suffix}<extra></extra>",
            )
    return Figure(
        plot=figure, height=HEIGHT, note="KL is taken while FullKV's answer is fed to each cache."
    )
