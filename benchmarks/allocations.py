"""Which allocation of one KV-cache budget over the layers keeps a model's answers?

python -m benchmarks.allocations [--model NAME] [--samples N] [--seed N] [--capacities 64,96,192]

Every sample hides one fact in a document made of shuffled sentences, asks for it, and feeds
FullKV's own answer to the caches that each allocation leaves (teacher forcing), all from one
prefill and at equal bytes. Recorded per allocation: whether every digit of the fact is still the
most likely token, and the KL divergence of the next-token distributions from FullKV's.
"""

from __future__ import annotations

import argparse
import math
import random
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

import dynamickv as dkv
from benchmarks.prompts import EXAMPLES
from benchmarks.report import RESULTS, machine, write
from dynamickv.cache import prune
from dynamickv.decoding.decode import decode
from dynamickv.evaluate.statistics import bootstrap, wilson
from dynamickv.methods.base import ScoredMethod
from dynamickv.reading.observe import observed
from dynamickv.records import LayerObservation, Prefill, Retention
from dynamickv.scoring import window_attention

NAMES = ("Ashford", "Brindle", "Calder", "Dunmore", "Elstow", "Farrow", "Gorse", "Hawley")
SINKS = 4
"""First tokens, which attract attention whatever they say."""
ANSWER_TOKENS = 24


@dataclass(frozen=True, kw_only=True)
class Allocation(ScoredMethod):
    """SnapKV's scores under a budget per layer that `rule` sets, once all layers are seen."""

    name: ClassVar[str] = "Allocation"
    rule: str

    def start(self, num_layers: int) -> Any:
        """Weigh the layers while they pass."""
        selection = super().start(num_layers)
        selection.weights = []
        observe = selection.observe

        def weigh(layer: LayerObservation) -> range:
            selection.weights.append(shift(self, layer) if self.rule == "shift before" else 1.0)
            changed: range = observe(layer)
            if len(selection.weights) == num_layers:
                prefix = layer.prompt_length - self.window_size
                selection.held = shares(
                    depth_weights(self.rule, selection.weights), self.mean_budget, prefix
                )
            return changed

        selection.observe = weigh
        return selection


def shift(method: ScoredMethod, layer: LayerObservation) -> float:
    """How far the window's attention lies from that of the queries before it, sinks left out."""
    window, tail = method.window_size, layer.queries.shape[1]
    prefix = layer.prompt_length - window
    now = window_attention(layer.queries[:, tail - window :], layer.keys, layer.scaling)
    earlier = window_attention(
        layer.queries[:, : tail - window], layer.keys[:, :prefix], layer.scaling
    )
    before = earlier.mean(0)[SINKS:]
    share = now.mean(0)[SINKS:][: len(before)] / window
    return float((share / share.sum() - before / before.sum()).abs().sum()) / 2


def depth_weights(rule: str, weights: list[float]) -> list[float]:
    """The claims, scaled to a mean of 1 and tilted by depth as the rule's name says."""
    mean = statistics.mean(weights)
    scaled = [weight / mean if mean else 1.0 for weight in weights]
    last = max(len(weights) - 1, 1)
    if rule == "rising":
        scaled = [weight * (0.5 + place / last) for place, weight in enumerate(scaled)]
    if rule == "middle":
        scaled = [
            weight * (0.5 + math.sin(math.pi * place / last)) for place, weight in enumerate(scaled)
        ]
    return scaled


def shares(weights: list[float], mean: int, most: int) -> list[int]:
    """Whole budgets proportional to weights, none above `most`, summing to mean x layers."""
    total = min(mean, most) * len(weights)
    exact = [0.0] * len(weights)
    still = set(range(len(weights)))
    room = float(total)
    while still:
        claim = sum(weights[layer] for layer in still) or 1.0
        full = {layer for layer in still if room * weights[layer] / claim >= most}
        for layer in full or still:
            exact[layer] = float(most) if full else room * weights[layer] / claim
        if not full:
            break
        room -= most * len(full)
        still -= full
    whole = [int(value) for value in exact]
    order = sorted(range(len(weights)), key=lambda layer: whole[layer] - exact[layer])
    for layer in order[: total - sum(whole)]:
        whole[layer] += 1
    return whole


RULES = ("rising", "middle", "shift before")


def candidates(capacity: int) -> dict[str, dkv.CompressionMethod]:
    """Everything that is compared, by a name for the table."""
    methods: dict[str, dkv.CompressionMethod] = {
        "SnapKV": dkv.SnapKV(capacity=capacity),
        "SnapKV, adaptive heads": dkv.SnapKV(capacity=capacity, head_budgets="adaptive"),
        "PyramidKV": dkv.PyramidKV(capacity=capacity),
        "DynamicKV": dkv.DynamicKV(capacity=capacity),
        "DynamicKV, exact": dkv.DynamicKV(capacity=capacity, progressive=False),
        "ShiftKV": dkv.ShiftKV(capacity=capacity),
    }
    for rule in RULES:
        methods[rule] = Allocation(capacity=capacity, rule=rule)
    return methods


def sample(llm: dkv.LoadedModel, rng: random.Random, length: int) -> tuple[str, str, str]:
    """(document, question, the digits to be found), of about `length` tokens."""
    sentences = [
        sentence.strip()
        for path in sorted(EXAMPLES.glob("*.txt"))
        if path.stem not in ("code", "few-shot")
        for sentence in re.split(r"(?<=[.!?])\s+", path.read_text("utf-8"))
        if 20 < len(sentence) < 300
    ]
    rng.shuffle(sentences)
    name, code = rng.choice(NAMES), str(rng.randrange(10000, 100000))
    chosen: list[str] = []
    tokens = 0
    for sentence in sentences:
        tokens += len(llm.tokenizer(sentence, add_special_tokens=False).input_ids) + 1
        if tokens > length:
            break
        chosen.append(sentence)
    place = rng.randrange(len(chosen) + 1)
    chosen.insert(place, f"The special code of {name} is {code}.")
    question = f"What is the special code of {name}?"
    if llm.tokenizer.chat_template is None:
        question = f"Question: {question}\nAnswer: The special code of {name} is"
    return " ".join(chosen), question, code


@torch.inference_mode()
def forced_logits(
    llm: dkv.LoadedModel, read: Prefill, kept: Retention, answer: list[int]
) -> Tensor:
    """Logits of every answer token's place, (answer, vocabulary) float32, from a pruned cache that
    is fed that answer."""
    if len(answer) < 2:
        return read.logits[None].float()
    cache = prune(read, kept, room=len(answer))
    positions = torch.arange(read.length, read.length + len(answer) - 1, device=llm.device)
    with observed(llm.model):
        output = llm.model(
            torch.tensor([answer[:-1]], device=llm.device),
            position_ids=positions[None],
            past_key_values=cache,
            use_cache=True,
        )
    return torch.cat([read.logits[None], output.logits[0]]).float()


def digits_places(llm: dkv.LoadedModel, answer: list[int], code: str) -> list[int]:
    """Places of the answer's tokens that spell the code; none if it does not say the code."""
    text = ""
    spans = []
    for token in answer:
        start = len(text)
        text += llm.tokenizer.decode([token])
        spans.append((start, len(text)))
    at = text.find(code)
    return [i for i, (a, b) in enumerate(spans) if at >= 0 and a < at + len(code) and b > at]


def measure(llm: dkv.LoadedModel, rng: random.Random, length: int, capacities: list[int]) -> Any:
    """One sample under every allocation."""
    document, question, code = sample(llm, rng, length)
    templated = llm.tokenizer.chat_template is not None
    prefill = dkv.prefill(llm, document, question, chat_template=templated)
    cache = prune(prefill, dkv.FullKV().select(prefill.layers), room=ANSWER_TOKENS)
    steps = list(decode(llm, cache, prefill.logits, prefill.length, ANSWER_TOKENS))
    answer = [step.token_id for step in steps]
    places = digits_places(llm, answer, code)
    if places:
        answer = answer[: places[-1] + 1]
    whole = dkv.FullKV().select(prefill.layers)
    full = forced_logits(llm, prefill, whole, answer).log_softmax(-1)
    found: dict[str, dict[str, tuple[bool, float]]] = {}
    for capacity in capacities:
        found[str(capacity)] = {}
        for name, method in candidates(capacity).items():
            kept = method.select(prefill.layers)
            logits = forced_logits(llm, prefill, kept, answer).log_softmax(-1)
            right = bool(places) and all(
                int(logits[place].argmax()) == answer[place] for place in places
            )
            divergence = (full.exp() * (full - logits)).sum(-1)[1:].mean()
            found[str(capacity)][name] = right, float(divergence)
    return {"full": bool(places), "length": prefill.length, "found": found}


def table(samples: list[Any], capacity: str) -> list[dict[str, Any]]:
    """One row per allocation, against SnapKV sample by sample."""
    rows = []
    for name in samples[0]["found"][capacity]:
        pairs = [
            (one["found"][capacity][name], one["found"][capacity]["SnapKV"]) for one in samples
        ]
        hits = sum(mine[0] for mine, _ in pairs)
        gain = [float(mine[0]) - float(theirs[0]) for mine, theirs in pairs]
        closer = [theirs[1] - mine[1] for mine, theirs in pairs]
        rows.append(
            {
                "allocation": name,
                "found": hits / len(pairs),
                "found_interval": wilson(hits, len(pairs)),
                "over_snapkv": statistics.mean(gain),
                "over_snapkv_interval": bootstrap([gain]),
                "kl": statistics.mean(mine[1] for mine, _ in pairs),
                "kl_below_snapkv": statistics.mean(closer),
                "kl_below_snapkv_interval": bootstrap([closer]),
            }
        )
    return rows


def main() -> None:
    """Measure, print, write benchmarks/results/allocations-MODEL.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.allocations")
    parser.add_argument("--model", default=dkv.DEFAULT_MODEL)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--length", type=int, default=950, help="tokens of the document")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--capacities", default="64,96,192")
    options = parser.parse_args()
    where = machine()
    llm = dkv.load_model(options.model)
    capacities = [int(number) for number in options.capacities.split(",")]
    samples = []
    for index in range(options.samples):
        rng = random.Random(f"{options.seed}-{index}")
        samples.append(measure(llm, rng, options.length, capacities))
        print(f"{index + 1} of {options.samples}", end="\r", flush=True)
    print(f"{llm.name}: FullKV finds {statistics.mean(one['full'] for one in samples):.3f}")
    record = {
        "machine": where,
        "model": Path(llm.name).name,
        "samples": len(samples),
        "prompt_tokens": statistics.median(one["length"] for one in samples),
        "full": statistics.mean(one["full"] for one in samples),
        "seed": options.seed,
        "capacities": {str(capacity): table(samples, str(capacity)) for capacity in capacities},
    }
    for capacity, rows in record["capacities"].items():
        print(f"capacity {capacity}")
        for row in sorted(rows, key=lambda row: row["kl"]):
            print(
                f"  {row['allocation']:<34} found {row['found']:.3f}"
                f" ({row['over_snapkv_interval'][0]:+.3f}..{row['over_snapkv_interval'][1]:+.3f})"
                f"  KL {row['kl']:.4f}"
                f" ({row['kl_below_snapkv_interval'][0]:+.4f}.."
                f"{row['kl_below_snapkv_interval'][1]:+.4f})"
            )
    stem = Path(llm.name).stem.lower()
    write(RESULTS / f"allocations-{stem}-seed{options.seed}.json", record)


if __name__ == "__main__":
    main()
