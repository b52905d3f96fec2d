"""The page of one run as a single file: the same views, and no server, no model, no network.

The skeleton here is the same for every run; the browser puts the run into it. Its policy lets
nothing be fetched from anywhere, whatever a run's text says.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from app.theme import MONO, SANS

from .base import SCRIPTS, dumps, read, styles

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; base-uri 'none'; form-action 'none'"
)
SECTIONS = (
    ("answers", "answer_cards", "dkv-answers"),
    ("document", "document_view", "dkv-document-view"),
    ("figures", "figure_view", "dkv-figures"),
    ("film", "film", "dkv-film"),
    ("word", "word_view", "dkv-word"),
    ("evidence", "evidence", "dkv-evidence"),
    ("map", "layer_map", "dkv-map"),
)
PLACE = '"the run goes here"'
BASE_STYLE = """
body { margin: 0; background: var(--dkv-page); color: var(--dkv-ink); --font-mono: %s;
  font-family: %s; }
main { max-width: 1400px; margin: 0 auto; padding: 16px; display: grid; gap: 16px; }
main > header { display: flex; justify-content: space-between; align-items: baseline; gap: 16px; }
main h1 { font-size: 22px; margin: 0; }
.dkv-two { display: grid; gap: 16px; grid-template-columns: minmax(0, 6fr) minmax(0, 5fr); }
main > *, .dkv-two > * { min-width: 0; }
.dkv-why { display: grid; gap: 16px; align-content: start; }
button { font-family: inherit; }
#dkv-theme { border-color: var(--dkv-line); background: var(--dkv-panel); color: var(--dkv-ink); }
@media (max-width: 900px) { .dkv-two { grid-template-columns: minmax(0, 1fr); } }
"""
BOOT = """
(() => {
  "use strict";
  const { run, cards } = JSON.parse(document.getElementById("dkv-run").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const follow = () => document.body.classList.toggle("dark", dark.matches);
  dark.addEventListener("change", follow);
  follow();
  document.getElementById("dkv-theme").addEventListener("click",
    () => document.body.classList.toggle("dark"));
  const values = { answers: cards };
  for (const element of document.querySelectorAll("[data-view]")) {
    const { view, titles } = element.dataset;
    const value = JSON.stringify(values[view] ?? null);
    window.DynamicKV.mount(view, element, { value, titles }, () => {});
  }
  window.DynamicKV.setTrace(run);
})();
"""


@lru_cache(maxsize=1)
def offline_page(plotly: str, titles: tuple[tuple[str, str], ...]) -> str:
    """The skeleton; `plotly` is the chart library's source, `titles` the views' keys and titles."""
    shown: list[dict[str, Any]] = [{"key": key, "title": title} for key, title in titles]
    parts = {view: section(view, name, id_, dumps(shown)) for view, name, id_ in SECTIONS}
    body = "\n".join(
        [
            parts["answers"],
            parts["film"],
            f'<div class="dkv-two">{parts["document"]}'
            f'<div class="dkv-why">{parts["word"]}{parts["figures"]}</div></div>',
            parts["map"],
            parts["evidence"],
        ]
    )
    fonts = BASE_STYLE % (", ".join(MONO), ", ".join(f'"{name}"' for name in SANS))
    scripts = "\n".join(read(f"{name}.js") for name in SCRIPTS)
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            "<title>DynamicKV Explorer: one run</title>",
            f"<style>{styles()}\n{fonts}</style></head>",
            '<body class="dkv-offline"><main><header><h1>DynamicKV Explorer: one run</h1>',
            '<button type="button" id="dkv-theme" class="dkv-toggle">Light or dark</button>',
            f"</header>{body}</main>",
            f'<script type="application/json" id="dkv-run">{PLACE}</script>',
            f"<script>{plotly}</script>",
            f"<script>{scripts}</script>",
            f"<script>{BOOT}</script></body></html>",
        ]
    )


def section(view: str, template: str, id_: str, titles: str) -> str:
    """One view's static template where the boot script finds it."""
    quoted = titles.replace("&", "&amp;").replace('"', "&quot;")
    return (
        f'<div id="{id_}" class="dkv-fill" data-view="{view}" data-titles="{quoted}">'
        f"{read(f'{template}.html')}</div>"
    )
