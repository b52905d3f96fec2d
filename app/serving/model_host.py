"""The models this page offers: one in memory at a time, the default loaded in the background, and
always able to say how that goes.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

import dynamickv as dkv

log = logging.getLogger(__name__)
Loader = Callable[[str], dkv.LoadedModel]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelState:
    """Where a model stands: "loading", "ready" or "failed", and one sentence about it."""

    state: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSize:
    """Tokens of a prompt and the longest prompt the model reads."""

    prompt: int
    document: int
    question: int
    limit: int


MAX_NAME = 300
"""Longest model name that is looked at, in characters."""


class ModelHost:
    """Keeps the model; knows nothing of users. `default` starts loading when `start` is called.

    Loading another model frees the one before. Callers take turns (turns.py), so that none is
    freed while it runs.
    """

    def __init__(
        self,
        default: str = dkv.DEFAULT_MODEL,
        loader: Loader = dkv.load_model,
        also: Iterable[str] = (),
        allow_any: bool = False,
    ) -> None:
        self.default = default
        self.allow_any = allow_any
        self.names = list(dict.fromkeys([default, *dkv.KNOWN_MODELS, *also]))
        self._loader = loader
        self._models: dict[str, dkv.LoadedModel] = {}
        self._failures: dict[str, str] = {}
        self._loading = threading.Lock()
        self._tokenizing = threading.Lock()
        self._settled = threading.Event()

    def start(self) -> None:
        """Load the default model in the background."""
        threading.Thread(target=self.load_default, name="load-model", daemon=True).start()

    def load_default(self) -> None:
        """Load it now and wait."""
        try:
            self.get(self.default)
        except (ValueError, OSError, MemoryError):
            pass  # `state` tells it
        finally:
            self._settled.set()

    def wait(self, seconds: float) -> bool:
        """Whether the default model is settled, ready or failed, within that time."""
        return self._settled.wait(seconds)

    @property
    def settled(self) -> bool:
        """Whether the background load has ended, well or not."""
        return self._settled.is_set()

    def check(self, name: str) -> str:
        """The name, if this page offers it.

        Raises:
            ValueError: any other name; the server must not fetch what a stranger chose.
        """
        if self.allow_any and isinstance(name, str) and 0 < len(name.strip()) <= MAX_NAME:
            return name.strip()
        if not isinstance(name, str) or name not in self.names:
            name = name if isinstance(name, str) and len(name) < 80 else "of that name"
            raise ValueError(f"Unknown model {name!r}; this page offers {', '.join(self.names)}.")
        return name

    def get(self, name: str) -> dkv.LoadedModel:
        """The loaded model; loads it now when it is not there yet, waits when it is being loaded.

        Raises:
            ValueError, OSError, MemoryError: when it cannot be loaded, in one sentence.
        """
        name = self.check(name)
        with self._loading:
            if name not in self._models:
                self._failures.pop(name, None)
                try:
                    self._require_room(name)
                    # Two models at once might not fit.
                    self._models.clear()
                    dkv.release_memory()
                    self._models[name] = without_path(self._loader(name))
                except (ValueError, OSError, MemoryError) as error:
                    self._failures[name] = str(error)
                    raise
                log.info("model loaded", extra={"model": self.label(name)})
            return self._models[name]

    def _require_room(self, name: str) -> None:
        """Raise ValueError for a model that cannot fit, before the one in memory is given up."""
        known = dkv.KNOWN_MODELS.get(name)
        if known is None or name == self.default:
            return
        needed, free = self._sizes(known)
        if needed > free:
            raise ValueError(
                f"{name} needs about {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free "
                "here: choose a smaller model."
            )

    def _sizes(self, known: dkv.KnownModel) -> tuple[int, int]:
        """Bytes that a model needs here, and that are free once the one in memory is given up."""
        device, free = dkv.free_memory()
        held = sum(llm.nbytes for llm in list(self._models.values()))
        return known.bytes_needed(4 if device == "cpu" else 2), free + held

    def loaded(self) -> str | None:
        """The model in memory."""
        return next((self.label(name) for name in list(self._models)), None)

    def label(self, name: str) -> str:
        """A name that says nothing about this machine: a folder's or file's own, without path."""
        return name if name in dkv.KNOWN_MODELS else PurePath(name).name

    def ready(self, name: str) -> dkv.LoadedModel | None:
        """The model if it is loaded already."""
        return self._models.get(name)

    def maker(self, trace: dkv.Trace) -> str:
        """The offered model that made a record.

        Raises:
            ValueError: none of the offered.
        """
        name = trace.model.name
        for offered in self.names:
            model = self.ready(offered)
            if name in (offered, model.name if model else None):
                return offered
        raise ValueError(f"This record is of {name!r}, which this page does not offer.")

    def state(self, name: str | None = None) -> ModelState:
        """How the model stands, for the page's head."""
        name = name or self.default
        label = self.label(name)
        model = self._models.get(name)
        if model is not None:
            computes = "fast products" if model.precision == "fast" else model.dtype
            message = f"{label} ready · {computes} on {model.device}"
            return ModelState(state="ready", message=message)
        if name in self._failures:
            why = self._failures[name].replace(name, label)
            return ModelState(state="failed", message=f"{label} did not load: {why}")
        if self.settled:
            return ModelState(state="ready", message=f"{label} loads when it is used")
        return ModelState(state="loading", message=f"loading {label} …")

    def measure(self, name: str, document: str, question: str) -> PromptSize | None:
        """Exact prompt length, or None while the model is not loaded."""
        model = self.ready(name)
        if model is None:
            return None
        tokenizer = model.tokenizer
        content = f"{document}\n\n{question}"
        message = [{"role": "user", "content": content}]
        text = (
            str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
            if tokenizer.chat_template
            else content
        )
        with self._tokenizing:
            counts = [
                len(tokenizer(part, add_special_tokens=False)["input_ids"])
                for part in (text, document, question)
            ]
        return PromptSize(
            prompt=counts[0],
            document=counts[1],
            question=counts[2],
            limit=model.geometry.max_positions,
        )

    def describe(self) -> list[dict[str, Any]]:
        """The offered models, for the /models endpoint: what each is, needs, and whether it fits
        here.
        """
        rows = []
        for name in self.names:
            known = dkv.KNOWN_MODELS.get(name)
            row: dict[str, Any] = {
                "name": name,
                "description": known.description if known else "given on the command line",
                "licence": known.licence if known else None,
                "default": name == self.default,
                "state": self.state(name).state
                if name == self.default or name in self._models or name in self._failures
                else "not loaded",
            }
            if known is not None:
                needed, free = self._sizes(known)
                row |= {
                    "hub_id": known.hub_id,
                    "revision": known.revision,
                    "parameters": known.parameters,
                    "context": known.context,
                    "gated": known.gated,
                    "bytes_needed": needed,
                    "bytes_free": free,
                    "fits": needed <= free,
                }
            rows.append(row)
        return rows

    def choices(self) -> list[tuple[str, str]]:
        """What a menu shows for each offered model, and its name."""
        shown = []
        for row in self.describe():
            known = dkv.KNOWN_MODELS.get(row["name"])
            if known is None:
                shown.append((self.label(row["name"]), row["name"]))
                continue
            notes = [
                f"{row['bytes_needed'] / 2**30:.1f} GiB",
                known.licence,
                f"{known.context:,} tokens",
                "fits here" if row["fits"] else "does not fit here",
            ]
            shown.append((f"{known.name} ({', '.join(notes)})", known.name))
        return shown


def without_path(llm: dkv.LoadedModel) -> dkv.LoadedModel:
    """The model under a name that its records can carry to others: where it lies on this machine is
    nobody's business.
    """
    return replace(llm, name=Path(llm.name).name) if Path(llm.name).exists() else llm
