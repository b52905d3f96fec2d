"""The whole flow, in one place: one prefill, every method's choice, answers decoded in lockstep,
one run record."""

from __future__ import annotations

import platform
import queue
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from datetime import datetime, timezone

import torch
import transformers

from dynamickv.answer import Answer, probabilities_along
from dynamickv.decoding.cuda_graph import graphable
from dynamickv.decoding.together import Together
from dynamickv.memory import ANSWERING, CHOOSING, READING, memory_watched
from dynamickv.methods import METHODS, CompressionMethod, FullKV
from dynamickv.models import LoadedModel
from dynamickv.reading.prefill import TAIL
from dynamickv.reading.prefill import prefill as run_prefill
from dynamickv.reading.prompt import encode_prompt, require_text
from dynamickv.record.agreement import agreement
from dynamickv.record.events import ComparisonFinished, Event, Progress, RunFinished
from dynamickv.record.trace import Divergence, ModelInfo, Prompt, Run, Trace
from dynamickv.records import EncodedPrompt, Prefill
from dynamickv.version import engine_version


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
    question_aware: bool = True,
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
        question_aware=question_aware,
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
    question_aware: bool = True,
    truncate: bool = False,
    scores: bool = False,
    earlier: Sequence[Run] = (),
    full_apart: bool = True,
    on_prefill: Callable[[Prefill], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Generator[Event, None, None]:
    """`compare`, telling what happens while it happens.

    Yields Progress for every layer of the prefill, Compressed for every method, Token for every
    decoded token (the methods take turns), RunFinished, and ComparisonFinished at the end. Closing
    the generator stops the work within one layer or one token and frees its memory.

    Args:
        methods: what to compare, in this order; FullKV among them gives the others `agreement`.
        prefill: a prompt that was read before, instead of document and question: no new forward
            pass. One of a document alone takes any question.
        max_new_tokens: longest answer in tokens.
        question_aware: False compresses right after the document and then feeds the question to
            the compressed caches, so that nothing is kept for the question's sake.
        truncate: cut the middle out of a document that is too long instead of refusing it.
        scores: record every scored method's importance per layer and position.
        earlier: runs of this `prefill` that are done; the record holds them before the new ones,
            and a FullKV among them is what the new ones are compared with.
        full_apart: decode FullKV apart from the others, so that its answer is `generate`'s to the
            last bit and its time its own; False lets it share their pass, which is quicker.
        on_prefill: called with the prompt's prefill once it is read, to keep it for later.
        should_stop: asked between tokens and layers; once true, what exists is finished as
            "cancelled".

    Raises:
        ValueError: an empty or too long prompt, no methods, or a bad number, in one sentence.
        OutOfMemory: what to lower, in one sentence; nothing is left behind.
    """
    _validate(document, question, methods, prefill, max_new_tokens)
    stop = should_stop or (lambda: False)
    if prefill is None:
        with memory_watched(READING):
            prefill = yield from _prefill_stream(
                llm,
                lambda on_layer: run_prefill(
                    llm,
                    str(document),
                    question,
                    question_aware=question_aware,
                    truncate=truncate,
                    tail=max(TAIL, *(method.tail for method in methods)),
                    mass=any(method.needs_mass for method in methods),
                    on_layer=on_layer,
                ),
                stop,
            )
        if prefill is None:
            return
    if on_prefill is not None:
        on_prefill(prefill)
    prompt = prefill.prompt if prefill.question_aware else _with_question(llm, prefill, question)
    # With two compressed runs there is little to share, and alone each is timed by itself.
    together = Together(llm) if len(methods) > 3 and not graphable(llm) else None
    with memory_watched(CHOOSING):
        answers = [
            Answer(llm, prefill, prompt, method, max_new_tokens, scores) for method in methods
        ]
    if together is not None:
        # Runs that keep everything must say the same to the last bit, which a shared pass cannot
        # promise.
        apart = full_apart or sum(answer.keeps_everything for answer in answers) > 1
        for answer in answers:
            if not (apart and answer.keeps_everything):
                answer.join(together)
    try:
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
                    with memory_watched(ANSWERING):
                        token = answer.step(index)
                    yield token
                if answer.finish_reason is not None:
                    finished[index] = answer.finish()
                    yield RunFinished(index, finished[index])
        runs = [*earlier, *(finished[index] for index in range(len(answers)))]
        runs = _with_agreement(runs, len(earlier))
        runs = _with_divergences(llm, prefill, prompt, answers, runs)
        yield ComparisonFinished(_trace(llm, prefill, prompt, runs))
    finally:
        # Closed outside of any block, Python 3.12 would keep all this as long as the generator.
        answers.clear()


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
    elif document is not None:
        raise ValueError("the document is part of the prefill; give one or the other")
    elif prefill.question_aware and question is not None:
        raise ValueError(
            "the question is part of this prefill; leave it out, or prefill the document alone"
        )
    elif not prefill.question_aware and not (question or prefill.prompt.question):
        raise ValueError("this prefill holds a document alone; give a question")


def _with_question(llm: LoadedModel, prefill: Prefill, question: str | None) -> EncodedPrompt:
    """The whole prompt for a prefill of its document alone."""
    start, end = prefill.prompt.document_characters
    prompt = encode_prompt(
        llm.tokenizer,
        prefill.prompt.text[start:end],
        question or prefill.prompt.question,
        limit=llm.geometry.max_positions,
        chat_template=prefill.prompt.chat_template,
    )
    if prompt.token_ids[: prefill.length] != prefill.prompt.token_ids:
        raise ValueError(
            "this question changes how the document is tokenized; prefill them together"
        )
    cut = prefill.prompt.original_length - prefill.length
    return replace(prompt, original_length=prompt.length + cut)


def _prefill_stream(
    llm: LoadedModel,
    run: Callable[[Callable[[int], None]], Prefill],
    stop: Callable[[], bool],
) -> Generator[Event, None, Prefill | None]:
    """Run a prefill in a thread, so that its progress can be told and it can be stopped.

    None when it was stopped.
    """
    total = len(llm.geometry.compressed_layers)
    messages: queue.SimpleQueue[int | Prefill | BaseException] = queue.SimpleQueue()
    abandoned = threading.Event()

    def on_layer(layer: int) -> None:
        if abandoned.is_set() or stop():
            raise Cancelled
        messages.put(layer)

    def work() -> None:
        try:
            messages.put(run(on_layer))
        except Cancelled:  # the one just caught would keep the prefill's tensors alive
            messages.put(Cancelled())
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
                return None if stop() else message
            elif isinstance(message, Cancelled):
                return None
            else:
                raise message
    finally:
        abandoned.set()
        worker.join()


def _yardstick(runs: Sequence[Run]) -> Run | None:
    """FullKV's run, when there is one that ran to its end."""
    run = next((run for run in runs if run.method == FullKV.name), None)
    return None if run is None or run.finish_reason == "cancelled" else run


def _with_agreement(runs: list[Run], first: int) -> list[Run]:
    """Compare every answer from `first` on with FullKV's."""
    yardstick = _yardstick(runs)
    if yardstick is None:
        return runs
    compared = [replace(run, agreement=agreement(run, yardstick)) for run in runs[first:]]
    return [*runs[:first], *compared]


def _with_divergences(
    llm: LoadedModel,
    prefill: Prefill,
    prompt: EncodedPrompt,
    answers: Sequence[Answer],
    runs: list[Run],
) -> list[Run]:
    """Add how probable both tokens were where the last runs, those of `answers`, leave FullKV's.

    One short pass per cache over the words that both answers share; decoding itself is not touched.
    """
    yardstick = _yardstick(runs)
    if yardstick is None:
        return runs
    first = len(runs) - len(answers)
    places: dict[int, int] = {}
    for index, run in enumerate(runs[first:], first):
        at = run.agreement.first_divergence if run.agreement else None
        if at is not None and at < min(len(run.token_ids), len(yardstick.token_ids)):
            places[index] = at
    both = {
        index: [runs[index].token_ids[at], yardstick.token_ids[at]] for index, at in places.items()
    }
    wanted = [(at, both[index]) for index, at in places.items()]
    if not wanted:
        return runs
    everything = FullKV().select(prefill.layers)
    full = probabilities_along(llm, prefill, prompt, everything, yardstick.token_ids, wanted)
    made = list(runs)
    for (index, at), whole in zip(places.items(), full, strict=True):
        run, retention = runs[index], answers[index - first].retention
        own = probabilities_along(
            llm, prefill, prompt, retention, run.token_ids, [(at, both[index])]
        )
        divergence = Divergence(
            token_ids=both[index],
            pieces=[run.pieces[at], yardstick.pieces[at]],
            probabilities=own[0],
            probabilities_full=whole,
        )
        assert run.agreement is not None
        made[index] = replace(run, agreement=replace(run.agreement, divergence=divergence))
    return made


def _trace(llm: LoadedModel, prefill: Prefill, prompt: EncodedPrompt, runs: list[Run]) -> Trace:
    geometry = llm.geometry
    return Trace(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z"),
        versions={
            **engine_version(),
            "python": platform.python_version(),
            "torch": str(torch.__version__),
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
            sliding_layers=sorted(geometry.windows),
            layer_kinds=list(geometry.kinds),
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
