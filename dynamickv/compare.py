"""The whole flow, in one place: one prefill, every method's choice, answers decoded in lockstep,
one run record."""

from __future__ import annotations

import platform
from collections.abc import Callable, Generator, Sequence
from datetime import datetime, timezone

import torch
import transformers

from dynamickv.answer import Answer, of_prompt, recording_for
from dynamickv.decoding.alignment import with_alignment
from dynamickv.decoding.cuda_graph import graphable
from dynamickv.decoding.together import Together
from dynamickv.memory import ANSWERING, CHOOSING, READING, memory_watched
from dynamickv.methods import METHODS, CompressionMethod
from dynamickv.methods.decoding import Decoding, require_decodable
from dynamickv.models import LoadedModel
from dynamickv.models.geometry import require_choosable
from dynamickv.neighbours import give_back_threads
from dynamickv.reading.prefill import prefill_prompt, prompt_to_read, whole_prompt
from dynamickv.reading.prefill_stream import prefill_stream
from dynamickv.reading.prompt import require_text
from dynamickv.record.agreement import with_agreement
from dynamickv.record.events import ComparisonFinished, Event, PromptEncoded, RunFinished
from dynamickv.record.expected import require_expected, with_expected
from dynamickv.record.trace import ModelInfo, Prompt, Run, Trace
from dynamickv.records import EncodedPrompt, Prefill
from dynamickv.version import engine_version
from dynamickv.walk import Chosen, Walks


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
    expected: str = "",
    decoding: Decoding | None = None,
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
        expected=expected,
        decoding=decoding,
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
    expected: str = "",
    decoding: Decoding | None = None,
    earlier: Sequence[Run] = (),
    full_apart: bool = True,
    on_prefill: Callable[[Prefill], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    watch: bool = False,
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
        truncate: cut the middle out of a document that is too long instead of refusing it, with
            room left for the answer.
        scores: record every scored method's importance per layer and position.
        expected: a passage or an answer to look for in the document and in every answer.
        decoding: go on compressing while answering; FullKV keeps everything all the same.
        earlier: runs of this `prefill` that are done; the record holds them before the new ones,
            and a FullKV among them is what the new ones are compared with.
        full_apart: decode FullKV apart from the others, so that its answer is `generate`'s to the
            last bit and its time its own; False lets it share their pass, which is quicker, and
            on a GPU lets all share one in place of a captured step for each.
        on_prefill: called with the prompt's prefill once it is read, to keep it for later.
        should_stop: asked between tokens and layers; once true, what exists is finished as
            "cancelled".
        watch: also yield PromptEncoded before the prompt is read, and meanwhile LayerKept for what
            every method holds of the layers that are read, at no more than 2 % of the reading. The
            methods then choose while it is read; what they choose is the same.

    Raises:
        ValueError: an empty or too long prompt, no methods, or a bad number, in one sentence.
        OutOfMemory: what to lower, in one sentence; nothing is left behind.
    """
    _validate(document, question, methods, prefill, max_new_tokens)
    require_expected(expected)
    for method in methods:
        require_choosable(llm.geometry, method.parameters)
        if method.capabilities.capacity:
            require_decodable(decoding, method, llm.geometry.joint)
    stop = should_stop or (lambda: False)
    chosen: list[Chosen | None] = [None] * len(methods)
    if prefill is None:
        with memory_watched(READING):
            to_read = prompt_to_read(
                llm,
                str(document),
                question,
                question_aware=question_aware,
                truncate=truncate,
                answer_tokens=max_new_tokens,
            )
            prompt = whole_prompt(llm, to_read, question)
            if watch:
                yield PromptEncoded(_model(llm), _prompt(prompt, question_aware))
                walks = Walks(
                    [of_prompt(method, decoding) for method in methods], llm, to_read, prompt
                )
            prefill = yield from prefill_stream(
                len(llm.geometry.compressed_layers),
                lambda on_layer, tell: prefill_prompt(
                    llm,
                    to_read,
                    **recording_for(methods),
                    on_layer=on_layer,
                    watch=walks.telling(tell) if watch else None,
                ),
                stop,
            )
        if prefill is None:
            return
        if watch:
            chosen = [*walks.chosen()]
    else:
        prompt = whole_prompt(llm, prefill.prompt, question)
    if on_prefill is not None:
        on_prefill(prefill)
    # With two compressed runs there is little to share, and alone each is timed by itself.
    # A captured step is an answer's own, and capturing takes longer than a short answer.
    alone = len(methods) <= 3 or (full_apart and graphable(llm))
    together = None if alone else Together(llm)
    with memory_watched(CHOOSING):
        answers = [
            Answer(llm, prefill, prompt, method, max_new_tokens, scores, decoding, done)
            for method, done in zip(methods, chosen, strict=True)
        ]
    chosen.clear()
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
        runs = with_agreement(runs, len(earlier))
        caches = [answer.again for answer in answers]
        runs = with_alignment(llm, prefill, prompt, caches, runs)
        yield ComparisonFinished(_trace(llm, prefill, prompt, runs, expected))
    finally:
        # Closed outside of any block, Python 3.12 would keep all this as long as the generator.
        answers.clear()
        if together is not None:
            together.end()
        give_back_threads()


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
    if isinstance(methods, CompressionMethod):
        raise ValueError(f"methods must be a list, got {methods.name} alone; put it in brackets")
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


def _trace(
    llm: LoadedModel, prefill: Prefill, prompt: EncodedPrompt, runs: list[Run], expected: str
) -> Trace:
    sought, runs = with_expected(prompt.text, prompt.document_characters, expected, runs)
    return Trace(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z"),
        versions={
            **engine_version(),
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
        model=_model(llm),
        prompt=_prompt(prompt, prefill.question_aware),
        prefill_seconds=prefill.seconds,
        runs=runs,
        expected=sought,
    )


def _model(llm: LoadedModel) -> ModelInfo:
    geometry = llm.geometry
    return ModelInfo(
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
        precision=llm.precision,
    )


def _prompt(prompt: EncodedPrompt, question_aware: bool) -> Prompt:
    return Prompt(
        length=prompt.length,
        text=prompt.text,
        text_utf16_offsets=prompt.utf16_offsets(),
        document_span=list(prompt.document_span),
        document_utf16_span=prompt.document_utf16_span(),
        question_span=list(prompt.question_span),
        question=prompt.question,
        question_aware=question_aware,
        truncated=prompt.truncated,
        original_length=prompt.original_length,
    )
