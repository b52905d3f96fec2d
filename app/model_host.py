"""The models this page offers: loaded in the background, one at a time, and always able to say how
that goes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import dynamickv as dkv

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


class ModelHost:
    """Keeps the models; knows nothing of users. `default` starts loading when `start` is called."""

    def __init__(
        self,
        default: str = dkv.DEFAULT_MODEL,
        loader: Loader = dkv.load_model,
        also: Iterable[str] = (),
    ) -> None:
        self.default = default
        self.names = list(dict.fromkeys([default, *dkv.KNOWN_MODELS, *also]))
        self._loader = loader
        self._models: dict[str, dkv.LoadedModel] = {}
        self._failures: dict[str, str] = {}
        self._loading = threading.Lock()
        self._tokenizing = threading.Lock()
        self._settled = threading.Event()

    def start(self) -> None:
        """Load the default model in the background."""
        threading.Thread(target=self._load_default, name="load-model", daemon=True).start()

    def _load_default(self) -> None:
        try:
            self.get(self.default)
        except (ValueError, OSError):
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
        if name not in self.names:
            raise ValueError(f"Unknown model {name!r}; this page offers {', '.join(self.names)}.")
        return name

    def get(self, name: str) -> dkv.LoadedModel:
        """The loaded model; loads it now when it is not there yet, waits when it is being loaded.

        Raises:
            ValueError, OSError: when it cannot be loaded, in one sentence.
        """
        self.check(name)
        with self._loading:
            if name not in self._models:
                self._failures.pop(name, None)
                try:
                    self._models[name] = self._loader(name)
                except (ValueError, OSError) as error:
                    self._failures[name] = str(error)
                    raise
            return self._models[name]

    def ready(self, name: str) -> dkv.LoadedModel | None:
        """The model if it is loaded already."""
        return self._models.get(name)

    def state(self, name: str | None = None) -> ModelState:
        """How the model stands, for the page's head."""
        name = name or self.default
        model = self._models.get(name)
        if model is not None:
            return ModelState(
                state="ready", message=f"{name} ready · {model.dtype} on {model.device}"
            )
        if name in self._failures:
            return ModelState(
                state="failed", message=f"{name} did not load: {self._failures[name]}"
            )
        return ModelState(state="loading", message=f"loading {name} …")

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
        """The offered models, for the /models endpoint."""
        rows = []
        for name in self.names:
            known = dkv.KNOWN_MODELS.get(name)
            rows.append(
                {
                    "name": name,
                    "description": known.description if known else "given on the command line",
                    "licence": known.licence if known else None,
                    "default": name == self.default,
                    "state": self.state(name).state
                    if name == self.default or name in self._models
                    else "not loaded",
                }
            )
        return rows
