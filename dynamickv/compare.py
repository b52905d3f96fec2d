"""The whole flow, in one place: one prefill, every method's choice, answers decoded in lockstep,
one run record."""

from __future__ import annotations

import platform
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timezone

import numpy as np
import torch
import transformers
from rouge import Rouge
from torch import Tensor

from dynamickv.cache import KVCache, prune
from dynamickv.decode import Step, TextStream, decode
from dynamickv.events import ComparisonFinished, Compressed, Event, Progress, RunFinished, Token
from dynamickv.methods import METHODS, CompressionMethod, FullKV, ScoredMethod
from dynamickv.models import LoadedModel
from dynamickv.prefill import TAIL
from dynamickv.prefill import prefill as run_prefill
from dynamickv.prompt import require_text
from dynamickv.records import Prefill, Retention
from dynamickv.trace import Agreement, ModelInfo, Prompt, Retained, Run, Scores, Trace
from dynamickv.version import __version__


class Cancelled(Exception):
    """Raised inside the prefill when nobody waits for it any more."""


def compare(
    llm: LoadedModel,
    document: str | None = None,
    question: str | None = None,
    *,
    methods: Sequence[CompressionMethod],
    prefill: Prefill | None = None,
    max_new_tokens: int = 64,
    truncate: bool = False,
    scores: bool = False,
) -> Trace:
    """Answer one question with every method and record what each kept, took and said.

    Arguments and errors as in `compare_stream`.
    """
    for event in compare_stream(
        llm,
        document,
        question,
        methods=methods,
        prefill=prefill,
        max_new_tokens=max_new_tokens,
        truncate=truncate,
        scores=scores,
    ):
        if isinstance(event, ComparisonFinished):
            return event.trace
    raise RuntimeError("the comparison ended without a record")


def compare_stream(
    llm: LoadedModel,
    document: str | None = None,
    question: str | None = None,
    *,
    methods: Sequence[CompressionMethod],
    prefill: Prefill | None = None,
    max_new_tokens: int = 64,
    truncate: bool = False,
    scores: bool = False,
    should_stop: Callable[[], bool] | None = None,
) -> Generator[Event, None, None]:
    """`compare`, telling what happens while it happens.

    Yields Progress for every layer of the prefill, Compressed for every method, Token for every
    decoded token (the methods take turns), RunFinished, and ComparisonFinished at the end. Closing
    the generator stops the work within one layer or one token and frees its memory.

    Args:
        methods: what to compare, in this order; FullKV among them gives the others their
            `agreement`. prefill: a prompt that was read before, instead of document and question:
            no new forward pass. max_new_tokens: longest answer in tokens. truncate: cut the middle
            out of a document that is too long instead of refusing it. scores: record every scored
            method's importance per layer and position. should_stop: asked between tokens and
            layers; once true, what exists is finished as "cancelled".

    Raises:
        ValueError: an empty or too long prompt, no methods, or a bad number, in one sentence.
    """
    _validate(document, question, methods, prefill, max_new_tokens)
    stop = should_stop or (lambda: False)
    if prefill is None:
        tail = max(
            [TAIL, *(method.window_size for method in methods if isinstance(method, ScoredMethod))]
        )
        prefill = yield from _prefill_stream(
            llm, document or "", question or "", truncate, tail, stop
        )
        if prefill is None:
            return
    answers = [_Answer(llm, prefill, method, max_new_tokens, scores) for method in methods]
    for index, answer in enumerate(answers):
        yield answer.compressed(index)
    finished: dict[int, Run] = {}
    while len(finished) < len(answers):
        for index, answer in enumerate(answers):
            if index in finished:
                continue
            if stop():
                answer.finish_reason = "cancelled"
            else:
                yield answer.step(index)
            if answer.finish_reason is not None:
                finished[index] = answer.finish()
                yield RunFinished(index, finished[index])
    runs = _with_agreement([finished[index] for index in range(len(answers))])
    yield ComparisonFinished(_trace(llm, prefill, runs))


class _Answer:
    """One method's cache and the answer growing from it."""

    def __init__(
        self,
        llm: LoadedModel,
        prefill: Prefill,
        method: CompressionMethod,
        max_new_tokens: int,
        scores: bool,
    ) -> None:
        self._llm, self._prefill, self._method = llm, prefill, method
        start = time.perf_counter()
        self._retention = select(method, prefill)
        llm.synchronize()
        self._score_seconds = time.perf_counter() - start
        start = time.perf_counter()
        room = min(max_new_tokens, max(llm.geometry.max_positions - prefill.prompt.length, 0))
        self._cache: KVCache | None = prune(prefill, self._retention, room)
        llm.synchronize()
        self._prune_seconds = time.perf_counter() - start
        self._kv_bytes = self._cache.nbytes
        self._scores = (
            layer_scores(method, prefill) if scores and isinstance(method, ScoredMethod) else None
        )
        self._steps: Iterator[Step] = decode(
            llm, self._cache, prefill.logits, prefill.prompt.length, max_new_tokens
        )
        self._text = TextStream(llm)
        self._done: list[Step] = []
        self.finish_reason: str | None = None

    def compressed(self, index: int) -> Compressed:
        """What was kept, before any token is decoded."""
        return Compressed(
            run=index,
            method=self._method.name,
            budgets=self._retention.budgets,
            kept_fraction=self._retention.kept_fraction,
            kv_bytes=self._kv_bytes,
            score_seconds=self._score_seconds,
            prune_seconds=self._prune_seconds,
        )

    def step(self, index: int) -> Token:
        """Decode one token."""
        step = next(self._steps)
        self._done.append(step)
        self._text.push(step.token_id, final=step.last is not None)
        self.finish_reason = step.last
        return Token(index, self._method.name, step.token_id, self._text.text, step.seconds)

    def finish(self) -> Run:
        """The record of this answer; its cache is freed."""
        self._cache = None
        self._steps = iter(())
        return Run(
            method=self._method.name,
            parameters=self._method.parameters,
            answer=self._text.text,
            token_ids=[step.token_id for step in self._done],
            pieces=self._text.pieces,
            logprobs=[step.logprob for step in self._done],
            finish_reason=self.finish_reason or "cancelled",
            budgets=self._retention.budgets,
            budget_history=[list(update) for update in self._retention.budget_history],
            retained=Retained.pack(retained_mask(self._retention)),
            scores=None if self._scores is None else Scores.pack(self._scores),
            kv_bytes=self._kv_bytes,
            kv_bytes_full=self._prefill.kv_bytes,
            kept_fraction=self._retention.kept_fraction,
            score_seconds=self._score_seconds,
            prune_seconds=self._prune_seconds,
            decode_seconds=[step.seconds for step in self._done],
        )


@torch.inference_mode()
def select(method: CompressionMethod, prefill: Prefill) -> Retention:
    """A method's choice over a prefill."""
    return method.select(prefill.layers)


def retained_mask(retention: Retention) -> np.ndarray:
    """Boolean (layers, heads, positions)."""
    mask = np.zeros(
        (len(retention.indices), retention.indices[0].shape[0], retention.prompt_length), bool
    )
    for layer, kept in enumerate(retention.indices):
        np.put_along_axis(mask[layer], kept.cpu().numpy(), True, axis=1)
    return mask


@torch.inference_mode()
def layer_scores(method: ScoredMethod, prefill: Prefill) -> np.ndarray | None:
    """Scores averaged over heads, each layer scaled to 0..255, uint8 (layers, positions); the
    window reads 255.

    None when the prompt is too short to be scored.
    """
    length = prefill.prompt.length
    if length <= method.window_size:
        return None
    table = np.full((len(prefill.layers), length), 255, np.uint8)
    for index, layer in enumerate(prefill.layers):
        scores: Tensor = method.score(layer).mean(dim=0)
        scaled = scores / scores.max().clamp_min(torch.finfo(torch.float32).tiny) * 255
        table[index, : scores.shape[0]] = scaled.round().to(torch.uint8).cpu().numpy()
    return table


def _prefill_stream(
    llm: LoadedModel,
    document: str,
    question: str,
    truncate: bool,
    tail: int,
    stop: Callable[[], bool],
) -> Generator[Event, None, Prefill | None]:
    """Run the prefill in a thread, so that its progress can be told and it can be stopped; None
    when stopped."""
    total = llm.geometry.num_layers
    messages: queue.SimpleQueue[int | Prefill | BaseException] = queue.SimpleQueue()
    abandoned = threading.Event()

    def on_layer(layer: int) -> None:
        if abandoned.is_set() or stop():
            raise Cancelled
        messages.put(layer)

    def work() -> None:
        try:
            messages.put(
                run_prefill(
                    llm, document, question, truncate=truncate, tail=tail, on_layer=on_layer
                )
            )
        except BaseException as error:  # handed to the reader, which raises it
            messages.put(error)

    yield Progress("prefill", 0, total)
    worker = threading.Thread(target=work, name="prefill", daemon=True)
    worker.start()
    try:
        while True:
            message = messages.get()
            if isinstance(message, int):
                yield Progress("prefill", message, total)
            elif isinstance(message, Prefill):
                return message
            elif isinstance(message, Cancelled):
                return None
            else:
                raise message
    finally:
        abandoned.set()
        worker.join()


def _validate(
    document: str | None,
    question: str | None,
    methods: Sequence[CompressionMethod],
    prefill: Prefill | None,
    max_new_tokens: int,
) -> None:
    if (
        isinstance(max_new_tokens, bool)
        or not isinstance(max_new_tokens, int)
        or max_new_tokens < 1
    ):
        raise ValueError(
            f"max_new_tokens must be a whole number of at least 1, got {max_new_tokens!r}"
        )
    if not methods:
        raise ValueError(f"no method to compare; choose from {', '.join(METHODS)}")
    for method in methods:
        if not isinstance(method, CompressionMethod):
            raise ValueError(
                f"{method!r} is not a method; give instances such as dynamickv.FullKV()"
            )
    if prefill is None:
        require_text("document", document)
        require_text("question", question)
    if prefill is not None and (document is not None or question is not None):
        raise ValueError(
            "document and question are part of the prefill; give either the prefill or the texts"
        )


def _with_agreement(runs: list[Run]) -> list[Run]:
    """Compare every answer with FullKV's, when there is one that ran to its end."""
    yardstick = next((run for run in runs if run.method == FullKV.name), None)
    if yardstick is None:
        return runs
    return [replace(run, agreement=agreement(run, yardstick)) for run in runs]


def agreement(run: Run, yardstick: Run) -> Agreement:
    """How far `run` follows `yardstick`."""
    ours, theirs = run.token_ids, yardstick.token_ids
    longest = max(len(ours), len(theirs), 1)
    same = [a == b for a, b in zip(ours, theirs, strict=False)]
    return Agreement(
        first_divergence=None
        if ours == theirs
        else next((i for i, equal in enumerate(same) if not equal), len(same)),
        token_match=1.0 if ours == theirs else sum(same) / longest,
        rouge_l=rouge_l(run.answer, yardstick.answer),
    )


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L F-measure over words, 0 to 1; 1 for equal texts."""
    if prediction.split() == reference.split():
        return 1.0
    if not prediction.strip(" .\n") or not reference.strip(" .\n"):
        return 0.0
    return float(Rouge(metrics=["rouge-l"]).get_scores(prediction, reference)[0]["rouge-l"]["f"])


def _trace(llm: LoadedModel, prefill: Prefill, runs: list[Run]) -> Trace:
    prompt, geometry = prefill.prompt, llm.geometry
    return Trace(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z"),
        versions={
            "dynamickv": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        model=ModelInfo(
            name=llm.name,
            revision=llm.revision,
            num_layers=geometry.num_layers,
            num_query_heads=geometry.num_query_heads,
            num_kv_heads=geometry.num_kv_heads,
            head_dim=geometry.head_dim,
            dtype=llm.dtype,
            device=str(llm.device),
            attention=llm.attention,
            max_positions=geometry.max_positions,
        ),
        prompt=Prompt(
            length=prompt.length,
            text=prompt.text,
            text_utf16_offsets=prompt.utf16_offsets(),
            document_span=list(prompt.document_span),
            document_utf16_span=prompt.document_utf16_span(),
            question_span=list(prompt.question_span),
            question=prompt.question,
            question_aware=prefill.question_aware,
            truncated=prompt.truncated,
            original_length=prompt.original_length,
        ),
        prefill_seconds=prefill.seconds,
        runs=runs,
    )
