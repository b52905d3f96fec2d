"""The smallest capacity at which a method still answers: a bisection on a prompt that was read."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from dynamickv.answer import preview
from dynamickv.compare import compare, compare_stream
from dynamickv.methods import CompressionMethod, FullKV
from dynamickv.models import LoadedModel
from dynamickv.reading.prefill import whole_prompt
from dynamickv.record.events import ComparisonFinished, RunFinished
from dynamickv.record.expected import find_expected
from dynamickv.record.trace import Run
from dynamickv.records import Prefill

STEP = 8
"""Tokens between two capacities that are told apart."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One capacity was tried."""

    capacity: int
    answers: bool
    answer: str
    """The method's own answer; empty where only FullKV's words were looked at."""
    left: int
    """Capacities still to try, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Smallest:
    """What a search found."""

    method: str
    capacity: int
    """At this capacity the method answers, and at the next smaller one that was tried it does not:
    the least capacity may lie up to `step` - 1 tokens below. The prompt's length where nothing
    smaller does."""
    kept_fraction: float
    kv_bytes: int
    by: str
    """"facts": the answer holds what is expected. "words": no word of FullKV's answer is lost."""
    probes: list[Probe]

    @property
    def whole(self) -> bool:
        """Whether nothing less than the whole prompt does."""
        return self.kept_fraction >= 1


def smallest_capacity(
    llm: LoadedModel,
    prefill: Prefill,
    method: CompressionMethod,
    *,
    expected: Sequence[str] = (),
    question: str | None = None,
    full: Run | None = None,
    max_new_tokens: int = 64,
    step: int = STEP,
    on_probe: Callable[[Probe], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Smallest | None:
    """The smallest multiple of `step` as capacity at which `method` still answers; None if stopped.

    What lies between two multiples is not tried: `step=1` finds the least capacity itself, with
    three more probes than 8.

    Arguments and errors as in `search_capacity`.
    """
    search = search_capacity(
        llm,
        prefill,
        method,
        expected=expected,
        question=question,
        full=full,
        max_new_tokens=max_new_tokens,
        step=step,
        should_stop=should_stop,
    )
    while True:
        try:
            probe = next(search)
        except StopIteration as end:
            found: Smallest | None = end.value
            return found
        if on_probe is not None:
            on_probe(probe)


def search_capacity(
    llm: LoadedModel,
    prefill: Prefill,
    method: CompressionMethod,
    *,
    expected: Sequence[str] = (),
    question: str | None = None,
    full: Run | None = None,
    max_new_tokens: int = 64,
    step: int = STEP,
    should_stop: Callable[[], bool] | None = None,
) -> Generator[Probe, None, Smallest | None]:
    """`smallest_capacity`, telling every capacity that was tried; nothing is read again.

    A method answers where its answer holds every expected fact (`find_expected`). Where none are
    given, it answers as long as FullKV's own answer, fed to its cache, has no word that carries
    a loss (`Aligned.loss`): no word of which less than half of the probability survives. A method
    may fail again above the capacity found: a bisection supposes that it does not.

    Args:
        prefill: of any question, or of a document alone with `question`.
        method: its other settings stay as they are.
        expected: facts that a right answer holds.
        full: FullKV's run of this prompt, if there is one.
        max_new_tokens: longest answer.
        step: capacities are tried in multiples of it.
        should_stop: asked before every capacity; the search then ends without a result.

    Raises:
        ValueError: a method without a capacity, one that reads what was not recorded, an answer of
            FullKV that lacks a fact or has no word, or a bad step.
    """
    if not method.capabilities.capacity:
        raise ValueError(
            f"{method.name} has no capacity to search; choose a method that compresses"
        )
    if isinstance(step, bool) or not isinstance(step, int) or step < 1:
        raise ValueError(f"step must be a whole number of at least 1, got {step!r}")
    # Refuses a method that the prefill recorded nothing for.
    length = prefill.length
    preview(method, prefill)
    stop = should_stop or (lambda: False)
    if full is None:
        asked = None if prefill.question_aware else question
        made = compare(
            llm, None, asked, prefill=prefill, methods=[FullKV()], max_new_tokens=max_new_tokens
        )
        full = made.runs[0]
    facts = [fact for fact in expected if fact.strip()]
    for fact in facts:
        if find_expected(full.answer, fact) is None:
            raise ValueError(
                f"FullKV's own answer lacks {fact!r}, so no capacity can be judged by it; "
                "expect what FullKV says"
            )
    if not facts and not full.answer.strip():
        raise ValueError("FullKV's own answer is empty, so no word of it can be lost")
    sizes = capacities(method, length, step)
    tried: list[Probe] = []
    # At the prompt's length everything is kept: there it answers as FullKV does.
    fails, works = -1, len(sizes) - 1
    while works - fails > 1:
        place = (fails + works) // 2
        sized = with_capacity(method, sizes[place])
        longest = max_new_tokens if facts else None
        run = None if stop() else _answered(llm, prefill, sized, question, full, longest, stop)
        if run is None:
            return None
        if facts:
            holds = all(find_expected(run.answer, fact) is not None for fact in facts)
        else:
            holds = run.aligned is not None and run.aligned.loss is None
        fails, works = (fails, place) if holds else (place, works)
        left = max(0, works - fails - 1).bit_length()
        tried.append(Probe(sizes[place], holds, run.answer if facts else "", left))
        yield tried[-1]
    found = with_capacity(method, sizes[works])
    kept = preview(found, prefill, whole_prompt(llm, prefill.prompt, question).length)
    return Smallest(
        method=method.name,
        capacity=sizes[works],
        kept_fraction=kept.kept_fraction,
        kv_bytes=kept.kv_bytes,
        by="facts" if facts else "words",
        probes=tried,
    )


def _answered(
    llm: LoadedModel,
    prefill: Prefill,
    method: CompressionMethod,
    question: str | None,
    full: Run,
    longest: int | None,
    stop: Callable[[], bool],
) -> Run | None:
    """One capacity's answer of at most `longest` tokens, or, where that is None, only how FullKV's
    answer fares with its cache; None if it was stopped.
    """
    events = compare_stream(
        llm,
        None,
        None if prefill.question_aware else question,
        prefill=prefill,
        methods=[method],
        earlier=[full],
        max_new_tokens=longest or 1,
        should_stop=stop,
    )
    run = None
    with closing(events):
        for event in events:
            if isinstance(event, RunFinished):
                run = event.record
                # What follows holds the cache against FullKV's words, which facts do not need.
                if longest is not None:
                    break
            elif isinstance(event, ComparisonFinished):
                run = event.trace.runs[-1]
    return None if run is None or run.finish_reason == "cancelled" else run


def with_capacity(method: CompressionMethod, capacity: int) -> CompressionMethod:
    """The same method at another capacity.

    Raises:
        ValueError: it takes none so small.
    """
    return replace(method, capacity=capacity)  # type: ignore[call-arg]


def capacities(method: CompressionMethod, length: int, step: int = STEP) -> list[int]:
    """Multiples of `step` that the method takes, below a prompt's length, and the length."""
    found = []
    for size in range(step, length, step):
        try:
            with_capacity(method, size)
        except ValueError:
            continue
        found.append(size)
    return [*found, length]
