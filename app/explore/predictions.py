"""What is asked about a stored comparison without a run: what another method would keep of its
prompt, and the scores that its runs recorded.

Whatever a browser sends is checked here; knows neither the page nor the model.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import dynamickv as dkv
from app import inputs
from app.examples import EXAMPLE_KEY, Example
from app.form import decoding_for
from app.record.payload import predicted_payload
from app.serving.shelf import Held, Shelf


class Predictions:
    """Choices from the prefills on a shelf, and records of built-in examples."""

    def __init__(self, shelf: Shelf, examples: Mapping[str, Example]) -> None:
        self.shelf = shelf
        self.examples = examples
        self._chooser = ThreadPoolExecutor(1, thread_name_prefix="what-if")

    def prepare(self, prefill: dkv.Prefill) -> None:
        """Make any observation window quick, while nobody waits for it."""
        for layer in prefill.recalling:
            self._chooser.submit(layer.prepare)
        self._chooser.submit(dkv.give_back_threads)

    def predict(self, asked: Any) -> dict[str, Any]:
        """What a method would keep of a stored prompt, as the page draws it.

        Raises:
            ValueError: one sentence, where that cannot be said.
        """
        held, prefill = self.held(asked)
        method = inputs.build_what_if(asked)
        decoding = decoding_for(method, held.trace)
        if decoding is not None:
            method = decoding.of_prompt(method)
        require_mass(method, prefill)
        start = time.perf_counter()
        length = held.trace.prompt.length
        chosen = self._chooser.submit(dkv.preview, method, prefill, length)
        self._chooser.submit(dkv.give_back_threads)
        choice = chosen.result()
        run = {
            "method": method.name,
            "parameters": method.parameters,
            "budgets": choice.budgets,
            "budget_history": choice.budget_history,
            "retained": asdict(dkv.Retained.pack(choice.mask)),
            "kept_fraction": choice.kept_fraction,
            "kv_bytes": choice.kv_bytes,
            "window": getattr(method, "window_size", 0),
            "seconds": time.perf_counter() - start,
        }
        style = "Manual" if method.name == "Manual" else "What if"
        return predicted_payload(run, held.trace, style)

    def scores(self, asked: Any) -> str | None:
        """One run's recorded scores, base64 of uint8 (layer, position); None where there are none.

        Raises:
            ValueError: no such run.
        """
        runs = self.known(asked).trace.runs
        number = inputs.whole_number("run", asked.get("run"), 0, max(len(runs) - 1, 0))
        scores = runs[number].scores if runs else None
        return scores.bytes if scores else None

    def recorded_reads(self, asked: Any) -> dict[str, Any] | None:
        """What a built-in example's answer read, where that was recorded with its run."""
        example = self._example(asked)
        return example.reads if example is not None else None

    def _example(self, asked: Any) -> Example | None:
        key = asked.get("key") if isinstance(asked, dict) else None
        if not isinstance(key, str) or not key.startswith(EXAMPLE_KEY):
            return None
        return self.examples.get(key.removeprefix(EXAMPLE_KEY))

    def known(self, asked: Any) -> Held:
        """The comparison a browser names by its key: a stored one, or a built-in example's.

        Raises:
            ValueError: none such.
        """
        key = asked.get("key") if isinstance(asked, dict) else None
        example = self._example(asked)
        if example is not None and example.trace is not None:
            return Held(trace=example.trace, model="", kind="recorded", prefill=None)
        held = self.shelf.get(key)
        if held is None:
            raise ValueError("The page no longer holds this run: press Run once.")
        return held

    def held(self, asked: Any) -> tuple[Held, dkv.Prefill]:
        """The same with its prefill.

        Raises:
            ValueError: there is none.
        """
        held = self.known(asked)
        if held.prefill is None:
            raise ValueError("The page does not hold this prompt's keys and values: read it first.")
        return held, held.prefill


def require_mass(method: dkv.CompressionMethod, prefill: dkv.Prefill) -> None:
    """Raise ValueError where a method needs what this prefill did not record."""
    if method.needs_mass and prefill.layers[0].mass is None:
        raise ValueError(
            f"{method.name} needs the attention of all tokens, which was not recorded: "
            f"tick {method.name} and press Run once."
        )
