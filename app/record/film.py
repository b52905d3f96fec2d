"""The film of a run record: what every run held after each layer that was read, from the record
alone.
"""

from __future__ import annotations

from dynamickv.record.trace import Prompt, Run, Trace

from .words import window_tokens

MOST_LAYERS = 128
"""A film grows with their square, and files come from strangers."""


def film_of(trace: Trace) -> list[list[list[int]] | None]:
    """Per run, what it held after each layer; None where every layer kept at once what it ended
    with.
    """
    return [held_by_step(run, trace) for run in trace.runs]


def held_by_step(run: Run, trace: Trace) -> list[list[int]] | None:
    """Tokens held per head, observation window included: entry `s` has s + 1 layers.

    A layer holds its first budget until an update cuts it; a cut is permanent, and the last state
    is the record's own.
    """
    if not run.budget_history or trace.model.num_layers > MOST_LAYERS:
        return None
    window = window_tokens(run, trace.prompt)
    others = trace.model.uncompressed
    places = [place for place in range(trace.model.num_layers) if place not in others]
    updates = {len(update): update for update in run.budget_history}
    first = first_budget(run, trace.prompt, window)
    held: dict[int, int] = {}
    steps: list[list[int]] = []
    for place in range(trace.model.num_layers):
        seen = sum(other <= place for other in places)
        held[place] = run.budgets[place]
        if place in places:
            # Where no parameter says how much it first holds, the update at once does.
            start = first or (trace.prompt.length if seen in updates else 0)
            held[place] = max(run.budgets[place], start)
            for layer, budget in zip(places, updates.get(seen, []), strict=False):
                if layer in held:
                    held[layer] = max(run.budgets[layer], min(held[layer], window + budget))
        steps.append([held[layer] for layer in sorted(held)])
    steps[-1] = list(run.budgets)
    return steps


def ends_alone(run: Run, trace: Trace) -> bool:
    """Whether a record has a run's last budgets and not the larger ones that its layers held before
    (CAKE's): then the film shows the last ones from the start, and must say so.
    """
    layers = trace.model.num_layers - len(trace.model.uncompressed)
    if [len(update) for update in run.budget_history] != [layers]:
        return False
    return not first_budget(run, trace.prompt, window_tokens(run, trace.prompt))


def first_budget(run: Run, prompt: Prompt, window: int) -> int:
    """What a layer may hold before the first update, where the method's parameters say so; records
    come from strangers.
    """
    r_max, capacity = run.parameters.get("r_max"), run.parameters.get("capacity")
    if not isinstance(r_max, (int, float)) or not isinstance(capacity, int):
        return 0
    if not 0 < r_max < 1e6 or capacity <= window:
        return 0
    read = prompt.length if prompt.question_aware else prompt.document_span[1]
    return window + min(int(r_max * (capacity - window)), max(read - window, 0))
