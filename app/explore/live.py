"""A comparison while it runs: engine events in, answer cards and a status line out. No widgets, no
model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import dynamickv as dkv
from app.record.cards import card_frame, decode_row
from app.record.words import compressed_words, finish_words
from app.serving.speed import Estimate
from app.serving.status import reading, running
from app.wording import count, mebibytes, percent, seconds

from .film import Film

PREFILL_SHARE = 0.6
"""Part of the progress bar that reading the prompt takes; answering takes the rest."""


class LiveRun:
    """Accumulates events into what the page shows."""

    def __init__(
        self,
        methods: Sequence[str],
        question: str,
        max_new_tokens: int,
        num_layers: int,
        estimate: Estimate | None = None,
        *,
        before: Sequence[dict[str, Any]] = (),
        others: Mapping[int, str] | None = None,
        film: Film | None = None,
    ) -> None:
        self.before = list(before)
        """Finished cards that stay on screen before the new ones."""
        self.cards = [card_frame(method) for method in methods]
        self.question = question
        self.trace: dkv.Trace | None = None
        self._max_new_tokens = max_new_tokens
        self._num_layers = num_layers
        self._others = others
        """Layers that no method compresses, and their kind; guessed from budgets where not told."""
        self._estimate = estimate
        self._read = (0, 0)
        """Layers read, of how many."""
        self._answering: tuple[float, int] | None = None
        """When answering was first looked at, and how many tokens there were."""
        self._prompt_bytes: int | None = None
        self._full_budgets: list[int] | None = None
        self._tokens = [0] * len(methods)
        self._decode_seconds: list[list[float]] = [[] for _ in methods]
        self._status = running("Starting")
        self._film = film

    def add(self, event: Any) -> bool:
        """Take one event in; True when it is worth showing at once."""
        seen = self._film is not None and self._film.add(event)
        return self._add(event) or seen

    def film(self, now: float, at_once: bool) -> dict[str, Any] | None:
        """What the film has to show, at a time in seconds."""
        return None if self._film is None else self._film.picture(now, at_once)

    def _add(self, event: Any) -> bool:
        if isinstance(event, dkv.Progress):
            self._progress(event)
            return False
        if isinstance(event, dkv.Compressed):
            self._compressed(event)
            return True
        if isinstance(event, dkv.Token):
            self._token(event)
            return False
        if isinstance(event, dkv.RunFinished):
            self.cards[event.run]["state"] = (
                "stopped" if event.record.finish_reason == "cancelled" else "done"
            )
            self.cards[event.run]["finish"] = finish_words(event.record)
            return True
        if isinstance(event, dkv.ComparisonFinished):
            self.trace = event.trace
            return True
        return False

    def status(self, elapsed: float) -> dict[str, Any]:
        """The status line now: what is left is judged by the layers that are read and the tokens
        that are answered, and before the first of them by earlier runs.
        """
        words = self._left(elapsed) or (self._estimate.words(elapsed) if self._estimate else "")
        return self._status | {"detail": " · ".join(filter(None, (f"{elapsed:.1f} s", words)))}

    def _left(self, elapsed: float) -> str:
        """How long this goes on, at the speed of the layers or the tokens so far."""
        longest = max(self._tokens)
        if longest:
            self._answering = self._answering or (elapsed, longest)
            since, before = self._answering
            if longest == before:
                return ""
            left = (elapsed - since) * (self._max_new_tokens - longest) / (longest - before)
            return f"at most {seconds(left)} more" if left > 0 else ""
        done, total = self._read
        if not 0 < done < total:
            return ""
        return f"about {seconds(elapsed * (total - done) / done)} more to read the prompt"

    def payload(self) -> dict[str, Any]:
        """The cards now."""
        return {
            "source": "running now"
            if self._film
            else "running now · the views below show the run before",
            "question": self.question,
            "notice": "",
            "cards": [*self.before, *self.cards],
        }

    def _progress(self, event: dkv.Progress) -> None:
        self._read = (event.completed, event.total) if event.stage == "prefill" else (0, 0)
        if event.stage == "prefill":
            self._status = reading(event, PREFILL_SHARE)
        else:
            self._say(
                f"{event.stage.capitalize()}: {event.completed} of {event.total}", PREFILL_SHARE
            )

    def _compressed(self, event: dkv.Compressed) -> None:
        self._read = (0, 0)
        if event.method == "FullKV":
            self._prompt_bytes, self._full_budgets = event.kv_bytes, event.budgets
        card = self.cards[event.run]
        card["state"] = "running"
        card["kept"] = event.kept_fraction
        if event.method == "FullKV":
            card["chip"] = "keeps everything"
        elif event.kept_fraction >= 1:
            card["chip"], card["tone"] = "nothing to compress: the prompt fits", "loud"
        else:
            # A layer that no method compresses holds the same with every method.
            whole = self._full_budgets or [max(event.budgets)] * len(event.budgets)
            layers = sum(k < full for k, full in zip(event.budgets, whole, strict=True))
            others = self._others or {
                place: "sliding" for place, full in enumerate(whole) if full < max(whole)
            }
            words = compressed_words(layers, self._num_layers, others)
            card["chip"], card["tone"] = words, "good"
        self._put(event.run, "Kept", percent(event.kept_fraction), "of prompt")
        full = f"of {mebibytes(self._prompt_bytes)}" if self._prompt_bytes else ""
        self._put(event.run, "KV cache", mebibytes(event.kv_bytes), full)
        if event.method != "FullKV":
            self._put(
                event.run,
                "Score + prune",
                seconds(event.score_seconds + event.prune_seconds),
                "all layers",
            )
        self._say("Choosing what each method keeps (score and prune)", PREFILL_SHARE)

    def _token(self, event: dkv.Token) -> None:
        self._tokens[event.run] += 1
        self._decode_seconds[event.run].append(event.seconds)
        card = self.cards[event.run]
        card["answer"] = [event.answer, "", ""]
        card["finish"] = count(self._tokens[event.run], "token")
        self._put(event.run, "Decode", *decode_row(self._decode_seconds[event.run]))
        longest = max(self._tokens)
        share = longest / max(self._max_new_tokens, 1)
        self._say(
            f"Answering (decode): token {longest} of at most {self._max_new_tokens}",
            PREFILL_SHARE + (1 - PREFILL_SHARE) * share,
        )

    def _put(self, index: int, label: str, value: str, note: str) -> None:
        for row in self.cards[index]["receipts"]:
            if row["label"] == label:
                row["value"], row["note"] = value, note

    def _say(self, message: str, done: float) -> None:
        self._status = running(message, min(done, 1.0))
