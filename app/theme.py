"""How things look: one colour, pattern and glyph per method, and the page's colours, in one place.

Colours are Okabe-Ito's, which stay apart for colour-blind readers; a pattern and a glyph say the
same without colour. Dark variants are the same hues, lifted until they read at 4.5:1 on the dark
panels.
"""

from __future__ import annotations

from dataclasses import dataclass

import dynamickv as dkv


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodStyle:
    """The look of one method, the same in cards, charts, legends and tabs."""

    light: str
    dark: str
    pattern: str
    """Plotly fill pattern of its bars."""
    symbol: str
    """Plotly marker of its points."""
    glyph: str
    """The same marker as a character."""
    dash: str
    """Plotly dash of its lines."""


METHOD_STYLES: dict[str, MethodStyle] = {
    "FullKV": MethodStyle(
        light="#5b6470", dark="#a3adb8", pattern="", symbol="square", glyph="■", dash="solid"
    ),
    "StreamingLLM": MethodStyle(
        light="#2b85b8", dark="#56b4e9", pattern="-", symbol="triangle-up", glyph="▲", dash="dot"
    ),
    "H2O": MethodStyle(
        light="#b0558a", dark="#d98bb5", pattern="x", symbol="x", glyph="✖", dash="dashdot"
    ),
    "SnapKV": MethodStyle(
        light="#b26f00", dark="#e69f00", pattern="/", symbol="diamond", glyph="◆", dash="dash"
    ),
    "PyramidKV": MethodStyle(
        light="#007a59",
        dark="#2bbd92",
        pattern="\\",
        symbol="triangle-down",
        glyph="▼",
        dash="longdash",
    ),
    "DynamicKV": MethodStyle(
        light="#0072b2", dark="#4da6dd", pattern="", symbol="circle", glyph="●", dash="solid"
    ),
    "CAKE": MethodStyle(
        light="#8a5a44", dark="#d7a48b", pattern=".", symbol="hexagon2", glyph="⬣", dash="dash"
    ),
    "LAVa": MethodStyle(
        light="#b3261e", dark="#f28b82", pattern="x", symbol="star-diamond", glyph="✦", dash="dot"
    ),
    "KeyDiff": MethodStyle(
        light="#47750b", dark="#a3d65c", pattern="|", symbol="hourglass", glyph="⧗", dash="dashdot"
    ),
    "VoteKV": MethodStyle(
        light="#9a3fa8", dark="#dd93ea", pattern="/", symbol="triangle-left", glyph="◀", dash="dash"
    ),
    "Manual": MethodStyle(
        light="#c14a00", dark="#f08a4b", pattern="+", symbol="star", glyph="★", dash="longdashdot"
    ),
    # Not a method: a second run of one, with other settings.
    "What if": MethodStyle(
        light="#7a6a00", dark="#d6c934", pattern=".", symbol="hexagon", glyph="⬢", dash="dot"
    ),
}
SPARE_STYLES = (
    MethodStyle(
        light="#6b4fa0", dark="#b39ddb", pattern="|", symbol="pentagon", glyph="⬟", dash="dashdot"
    ),
    MethodStyle(
        light="#00707a", dark="#4cc3cf", pattern="+", symbol="cross", glyph="✚", dash="longdash"
    ),
)

INK, INK_DARK = "#1b1f24", "#e6e9ed"
MUTED, MUTED_DARK = "#5b6470", "#9ba6b2"
PAGE, PAGE_DARK = "#f6f7f8", "#0e1116"
PANEL, PANEL_DARK = "#ffffff", "#161b22"
LINE, LINE_DARK = "#dfe3e8", "#2b323c"
ACCENT, ACCENT_DARK = "#0072b2", "#4da6dd"

SANS = (
    "system-ui",
    "-apple-system",
    "Segoe UI",
    "Roboto",
    "Helvetica Neue",
    "Noto Sans",
    "Arial",
    "sans-serif",
)
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")


def method_style(name: str) -> MethodStyle:
    """The look of a method; a method not listed gets a spare look, always the same one for its
    name.
    """
    return METHOD_STYLES.get(name) or SPARE_STYLES[sum(map(ord, name)) % len(SPARE_STYLES)]


def css_variables() -> str:
    """The palette as CSS custom properties, light and dark, with one `--method` per `data-
    method`.
    """

    def rules(dark: bool) -> str:
        scope = ".dark" if dark else ""
        palette = (
            {
                "ink": INK_DARK,
                "muted": MUTED_DARK,
                "page": PAGE_DARK,
                "panel": PANEL_DARK,
                "line": LINE_DARK,
                "accent": ACCENT_DARK,
            }
            if dark
            else {
                "ink": INK,
                "muted": MUTED,
                "page": PAGE,
                "panel": PANEL,
                "line": LINE,
                "accent": ACCENT,
            }
        )
        lines = [
            f"{scope or ':root'} {{ "
            + " ".join(f"--dkv-{name}: {value};" for name, value in palette.items())
            + " }"
        ]
        for name, style in {
            **{name: method_style(name) for name in dkv.METHODS},
            **METHOD_STYLES,
        }.items():
            lines.append(
                f'{scope} [data-method="{name}"] {{ '
                f"--method: {style.dark if dark else style.light}; }}"
            )
        return "\n".join(lines)

    return rules(dark=False) + "\n" + rules(dark=True)
