"""Another question about a document that was read before: only the question is read, and methods
choose anew from all that the document left.

The document's keys and values are copied once; every question costs a pass over its own tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dynamickv.cache import prune
from dynamickv.decoding.decode import extend
from dynamickv.layers.kv import KVLayer
from dynamickv.models import LoadedModel
from dynamickv.reading.prefill import whole_prompt
from dynamickv.records import Attended, LayerObservation, Prefill, Retention
from dynamickv.scoring import attention_mass
from dynamickv.transfer import Stopwatch


@torch.inference_mode()
def with_question(
    llm: LoadedModel,
    prefill: Prefill,
    question: str,
    on_layer: Callable[[int], None] | None = None,
) -> Prefill:
    """What `prefill(llm, document, question)` gives, to rounding, from a prefill of the document
    alone, which stays as it is and serves the next question too.

    Args:
        on_layer: called with the number of layers done; an exception it raises stops the pass.

    Raises:
        ValueError: a prefill that holds a question already, an empty question, or one that
            changes how the document is tokenized.
    """
    if prefill.question_aware:
        raise ValueError(
            "this prefill was read with a question; prefill the document alone to ask several"
        )
    reading = Stopwatch(llm.device)
    prompt = whole_prompt(llm, prefill.prompt, question)
    later = prompt.token_ids[prefill.length :]
    cache = prune(prefill, Retention.everything(prefill.layers), len(later))
    before = dict(zip(prefill.places, prefill.layers, strict=True))
    read = {place: _Reading(layer) for place, layer in before.items()}
    done: set[int] = set()

    def saw(layer: KVLayer, attended: Attended) -> None:
        keys, values = layer.held()
        if keys.dtype != attended.keys.dtype:
            # The pass read copies in its own format, which would be held beside these.
            attended = replace(attended, keys=keys, values=values)
        read[layer.index].take(attended)
        done.add(layer.index)
        if on_layer is not None:
            on_layer(len(done))

    for place in prefill.places:
        cache.layers[place].after_attention = saw
    logits = extend(llm, cache, later, prefill.length)
    reading.stop()
    for place in prefill.places:
        cache.layers[place].after_attention = None
    held = [cache.layers[place].held() for place in prefill.places]
    return Prefill(
        prompt=prompt,
        layers=tuple(read[place].observation() for place in prefill.places),
        keys=tuple(keys[0] for keys, _ in held),
        values=tuple(values[0] for _, values in held),
        places=prefill.places,
        others=cache.others(llm.geometry.kinds),
        states=cache.states(),
        joint=prefill.joint,
        logits=logits,
        took=reading.seconds,
    )


class _Reading:
    """One layer while a question is read behind its document."""

    def __init__(self, before: LayerObservation) -> None:
        self._before = before
        self._queries = before.queries
        self._mass = before.mass
        self._last: Attended | None = None

    def take(self, attended: Attended) -> None:
        """What the layer's attention read in one pass over some of the question's tokens."""
        new = attended.queries.shape[2]
        if self._mass is not None:
            self._mass = F.pad(self._mass, (0, new)) + attention_mass(
                attended.queries[0],
                attended.keys[0],
                attended.scaling,
                attended.softcap,
                attended.sinks_of(0),
                None if attended.bias is None else attended.bias[0],
            )
        # What depends on each query is there for the question's own alone.
        apart = attended.bias is not None or (
            attended.sinks is not None and attended.sinks.dim() > 1
        )
        earlier: list[Tensor] = [] if apart else [self._queries]
        tail = self._before.queries.shape[1]
        self._queries = torch.cat([*earlier, attended.queries[0]], dim=1)[:, -tail:].clone()
        self._last = attended

    def observation(self) -> LayerObservation:
        """What methods may look at."""
        assert self._last is not None
        row = self._last.row(
            0,
            self._before.num_kv_heads,
            tail=min(self._last.queries.shape[2], self._queries.shape[1]),
            mass=self._mass,
        )
        return LayerObservation(
            queries=self._queries,
            keys=row.keys,
            scaling=row.scaling,
            values=row.values,
            mass=row.mass,
            softcap=row.softcap,
            sinks=row.sinks,
            bias=row.bias,
            stored_heads=row.stored_heads,
        )
