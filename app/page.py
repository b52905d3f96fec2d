"""The page: puts its tabs together, and gives each what it needs of the machine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import asdict

import anyio
import gradio as gr

import dynamickv as dkv

from .components import ModelChip
from .examples import Example, load_examples, load_gallery
from .explore.handlers import ExploreHandlers
from .explore.layout import build_explore, run_after, wire_opening
from .gallery.layout import build_gallery
from .lab.handlers import LabHandlers, OpeningHandlers
from .lab.layout import Shared, build_lab
from .launch import MAX_EVENTS, launch_options
from .learn.layout import build_learn
from .onward.handlers import HistoryHandlers, OnwardHandlers
from .onward.layout import wire_onward
from .runs.endpoints import add_endpoints
from .runs.handlers import RunsHandlers
from .runs.layout import build_runs
from .serving.comparisons import Comparisons
from .serving.events import LIGHT, handlers
from .serving.model_host import ModelHost
from .serving.shelf import Shelf
from .serving.shown import Shown
from .serving.turns import Turns

__all__ = ["MAX_EVENTS", "build_app", "launch_options"]
TITLE = "DynamicKV Explorer"


def build_app(
    host: ModelHost | None = None,
    examples: dict[str, Example] | None = None,
    url: str = "http://127.0.0.1:7860",
    turns: Turns | None = None,
    shelf: Shelf | None = None,
) -> gr.Blocks:
    """The whole page; `launch_options` has what its launch needs. The default model starts loading
    at once.
    """
    host, turns, shelf = host or ModelHost(), turns or Turns(), shelf or Shelf()
    examples = {**load_examples(), **load_gallery()} if examples is None else examples
    shown = Shown(shelf, examples)
    comparisons = Comparisons(host, examples.values())
    explore = ExploreHandlers.of(host, examples, comparisons, turns, shelf, shown)
    with gr.Blocks(
        title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600)
    ) as demo:
        with gr.Row(elem_id="dkv-head"):
            chip = ModelChip(asdict(host.state()), elem_id="dkv-model")
            model = gr.Dropdown(
                host.choices(),
                value=host.default,
                label="Model",
                show_label=False,
                container=False,
                allow_custom_value=host.allow_any,
                min_width=200,
                elem_id="dkv-model-choice",
            )
        with gr.Tabs() as tabs:
            with gr.Tab("Explore", id="explore"), gr.Row(elem_id="dkv-workbench"):
                widgets = build_explore(explore, host, examples, shown, model, chip)
                wire_onward(
                    OnwardHandlers(host, explore.predictions, explore.run.guarded, examples),
                    HistoryHandlers(explore.predictions, shown, host.names),
                    widgets,
                )
            with gr.Tab("Lab", id="lab"):
                shared = Shared(
                    widgets["document"],
                    widgets["question"],
                    widgets["model"],
                    {**widgets, "tabs": tabs},
                    lambda event: run_after(explore, widgets, event),
                )
                opening = OpeningHandlers(host, examples, turns)
                build_lab(LabHandlers(host, examples.values(), turns), opening, shared)
            if any(example.lost for example in examples.values()):
                with gr.Tab("Gallery", id="gallery"):
                    build_gallery(examples.values(), [host.label(name) for name in host.names])
            with gr.Tab("Learn", id="learn"):
                build_learn()
            with gr.Tab("Runs & API", id="runs") as runs:
                saved = RunsHandlers(host, shelf, shown, url)
                build_runs(saved, {**widgets, "tabs": tabs}, runs)
        gr.Markdown(f"{TITLE} {dkv.__version__}", elem_id="dkv-version")
        opened = demo.load(model_state(host), None, chip, **LIGHT)
        wire_opening(explore.form, widgets, demo, opened)
        add_endpoints(host, comparisons, turns)
    host.start()
    return demo  # type: ignore[no-any-return]


def model_state(host: ModelHost) -> Callable[[], AsyncIterator[dict[str, str]]]:
    """The event that tells how the default model stands."""

    @handlers
    async def model_state() -> AsyncIterator[dict[str, str]]:
        """Its state now, and again when it has loaded or failed."""
        yield asdict(host.state())
        if not host.settled:
            while not host.settled:
                await anyio.sleep(0.2)
            yield asdict(host.state())

    return model_state
