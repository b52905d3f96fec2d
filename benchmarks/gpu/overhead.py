"""What observing, choosing and pruning add to a prefill."""

from __future__ import annotations

import itertools

import torch
from transformers import DynamicCache

import dynamickv as dkv
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.models import ids_of, prompt
from benchmarks.gpu.timing import timed
from benchmarks.report import ratios
from dynamickv.cache import prune
from dynamickv.reading.prefill import prefill_prompt

TURNS = 5
"""Times that every order of the three is taken: single rounds differ by a hundredth."""


@torch.inference_mode()
def overhead(bench: Bench, name: str, llm: dkv.LoadedModel) -> None:
    """What observing, choosing and pruning add to a prefill."""
    encoded = prompt(llm, bench.long)
    ids = ids_of(llm, encoded)

    def plain() -> None:
        llm.model(ids, past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1)

    def explore() -> None:
        prefill = prefill_prompt(llm, encoded)
        prune(prefill, bench.method.select(prefill.layers), 64)

    def serve() -> None:
        with dkv.compress(llm.model, bench.method) as cache:
            llm.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    actions = [plain, explore, serve]
    for action in actions:
        action()
    seconds: list[list[float]] = [[], [], []]
    # Every order as often: what ran before leaves the chip warmer or cooler.
    orders = list(itertools.permutations(range(3))) * TURNS
    for index in itertools.chain(*orders):
        seconds[index] += timed(actions[index], 1, 0)
    alone, explored, served = seconds
    bench.facts[f"prefill seconds {name}"] = seconds
    bench.add(f"{name}: plain prefill, {bench.long} tokens", alone, "s")
    bench.add(
        f"{name}: (prefill + observe + score + prune) / plain prefill",
        ratios(explored, alone),
        target="<= 1.01",
        note=f"median of {len(orders)} rounds, in every order",
    )
    bench.add(
        f"{name}: serve mode, pruning while prefilling / plain prefill",
        ratios(served, alone),
        target="<= 1.01",
    )
    for action, label in zip(actions, ("plain", "explore", "serve"), strict=True):
        bench.profile(f"{name}-prefill-{label}", action, 1)
