"""The search for a training-free choice that beats SnapKV's and ShiftKV's at equal bytes.

python -m benchmarks.search --model FILE.gguf --output FILE.jsonl [--part I/N] [--seconds N]
python -m benchmarks.search --models DIR --output DIR --seconds N    (eight processes, two models)

Every prompt is read once. Each candidate then leaves a cache of the same capacity, which is fed
FullKV's own answer (teacher forcing). Recorded per candidate: whether every token of the value that
was asked for is still the likeliest, the share of the answer's tokens that are, and the KL
divergence from FullKV's next-token distributions. `--table FILE...` prints what files hold.

What is tried: votes of all layers and heads for the same places of the prompt (`Plan`), beside each
head's own choice; wider pooling and windows; matches with the question's rare tokens.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dynamickv as dkv
from benchmarks.allocations import digits_places, forced_logits
from benchmarks.report import RESULTS, markdown
from benchmarks.side_by_side import convert, environment, run
from dynamickv.answer import recording_for
from dynamickv.cache import prune
from dynamickv.decoding.decode import decode
from dynamickv.evaluate.datasets import read_tasks
from dynamickv.evaluate.haystack import Haystack
from dynamickv.evaluate.longbench import Protocol
from dynamickv.evaluate.needle import NeedleExperiment, NeedleGrid
from dynamickv.evaluate.ruler import make_examples
from dynamickv.evaluate.statistics import bootstrap
from dynamickv.methods.shiftkv import proportional_budgets
from dynamickv.reading.prefill import prefill, prefill_text
from dynamickv.records import Prefill, Retention
from dynamickv.scoring import (
    attention_shares,
    pool,
    reduce_group,
    top_positions,
    top_positions_of_layers,
)

DATA = Path(__file__).parent / "data"
TEXTS = Path(__file__).parent.parent / "assets"
SINKS = 4
WINDOW = 8
CONTEXT = 64
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """A candidate: what each head wants by itself, and what all layers vote for together."""

    votes: str = "max"
    """Statistic of the context's attention that a head votes with."""
    heads: str = "square"
    """How votes are summed: as they are, squared, cubed, each head the same; "shift" before it:
    times the layer's claim in ShiftKV."""
    smooth: int = 9
    """Width over which votes are averaged, odd."""
    back: int = 0
    forward: int = 32
    """How far before and after a place its votes count."""
    decay: float = 0.0
    """Part of its votes that the farthest place after it does not get."""
    share: float = 0.5
    """Part of the mean budget that goes to the places voted for, in every head."""
    budgets: str = "shift"
    local: str = "last"
    kernel: int = 7
    context: int = 32
    lexical: float = 0.0
    """Weight of matches with the last tokens of the prompt; 1 is those alone."""

    @property
    def name(self) -> str:
        """What differs from the defaults."""
        plain = Plan()
        told = [
            f"{key}={value}" for key, value in vars(self).items() if value != getattr(plain, key)
        ]
        return f"vote({', '.join(told)})"


class Read:
    """One prompt as it was read, with the attention of its last queries."""

    def __init__(self, prefilled: Prefill) -> None:
        self.prefill = prefilled
        self.length = prefilled.length
        self._votes: dict[Any, Tensor] = {}
        self._local: dict[Any, list[Tensor]] = {}

    @cached_property
    def shares(self) -> list[Tensor]:
        """Per layer, (query heads, context, positions)."""
        return [
            attention_shares(
                layer.queries[:, -2 * CONTEXT :],
                layer.keys,
                layer.scaling,
                layer.softcap,
                None if layer.sinks is None or layer.sinks.dim() > 1 else layer.sinks,
            )
            for layer in self.prefill.layers
        ]

    def statistic(self, layer: int, name: str, context: int) -> Tensor:
        """Per query head and position, (query heads, positions)."""
        shares = self.shares[layer]
        now, before = shares[:, -context:], shares[:, :-context]
        if not before.shape[1]:
            before = now
        if name == "last":
            return shares[:, -WINDOW:].mean(1)
        if name == "ctx":
            return now.mean(1)
        if name == "max":
            return now.amax(1)
        if name == "std":
            return now.std(1)
        if name == "square":
            return now.square().mean(1)
        if name == "rise":
            return (now.mean(1) - before.mean(1)).relu()
        if name == "maxrise":
            return (now.amax(1) - before.amax(1)).relu()
        if name == "squarerise":
            return (now.square().mean(1) - before.square().mean(1)).relu()
        raise ValueError(name)

    @cached_property
    def claims(self) -> list[float]:
        """ShiftKV's."""
        method = dkv.ShiftKV(capacity=64)
        claims = [method.claim(layer) for layer in self.prefill.recalling]
        last = max(len(claims) - 1, 1)
        return [claim * (0.5 + math.sin(math.pi * at / last)) for at, claim in enumerate(claims)]

    def local(self, name: str, kernel: int, context: int) -> list[Tensor]:
        """What each KV head wants by itself, 0 to 1, per layer (heads, prefix)."""
        key = name, kernel, context
        if key not in self._local:
            found = []
            for at, layer in enumerate(self.prefill.layers):
                scores = self.statistic(at, name, context)[:, : self.length - WINDOW]
                scores = reduce_group(scores.contiguous(), layer.num_kv_heads, "mean")
                scores = pool(scores, kernel, "max")
                found.append(scores / scores.amax(dim=1, keepdim=True).clamp_min(1e-30))
            self._local[key] = found
        return self._local[key]

    def voted(self, plan: Plan) -> Tensor:
        """What all heads vote for, (prefix,)."""
        key = (
            plan.votes, plan.heads, plan.context, plan.smooth, plan.back, plan.forward, plan.lexical
        )  # fmt: skip
        if key not in self._votes:
            self._votes[key] = self._spread(self._total(plan), plan)
        return self._votes[key]

    def _total(self, plan: Plan) -> Tensor:
        length = self.length
        total = self.shares[0].new_zeros(length)
        if plan.lexical < 1:
            for at in range(len(self.prefill.layers)):
                votes = self.statistic(at, plan.votes, plan.context).clone()
                votes[:, :SINKS] = 0
                votes[:, length - plan.context :] = 0
                how = plan.heads.removeprefix("shift ")
                if how == "square":
                    votes = votes.square()
                elif how == "cube":
                    votes = votes.pow(3)
                elif how == "same":
                    votes /= votes.sum(1, keepdim=True).clamp_min(1e-30)
                elif how == "sharp":
                    votes *= votes.amax(1, keepdim=True)
                if how != plan.heads:
                    votes *= self.claims[at]
                total += votes.sum(0)
        total /= total.max().clamp_min(1e-30)
        if plan.lexical:
            matched = self.matches(plan.context)
            total = total * (1 - plan.lexical) + plan.lexical * matched
        return total

    def _spread(self, total: Tensor, plan: Plan) -> Tensor:
        votes = pool(total[None], plan.smooth, "avg")
        # A place counts for those up to `back` before and `forward` after it.
        votes = F.pad(votes, (plan.forward, plan.back))
        reached = votes[0].unfold(0, plan.back + plan.forward + 1, 1)
        away = torch.arange(plan.forward, -plan.back - 1, -1, device=votes.device).clamp_min(0)
        votes = (reached * (1 - plan.decay * away / max(plan.forward, 1))).amax(dim=1)
        return votes[: self.length - WINDOW] / votes.max().clamp_min(1e-30)

    def matches(self, context: int) -> Tensor:
        """How rare the question's tokens are that stand at each place, runs counting for more."""
        ids = self.prefill.prompt.token_ids
        length = len(ids)
        end = length - context
        counts = collections.Counter(ids[:end])
        asked = ids[end:]
        grams = {tuple(asked[i : i + n]) for n in (1, 2, 3, 4) for i in range(len(asked) - n + 1)}
        found = [0.0] * length
        for at in range(end):
            for n in (1, 2, 3, 4):
                if at >= n - 1 and tuple(ids[at - n + 1 : at + 1]) in grams:
                    found[at] += math.log(1 + end / counts[ids[at]])
                else:
                    break
        held = torch.tensor(found, device=self.shares[0].device)
        return held / held.max().clamp_min(1e-30)

    def choose(self, plan: Plan, capacity: int) -> Retention:
        """What a plan keeps."""
        prefix = self.length - WINDOW
        mean = capacity - WINDOW
        layers = len(self.prefill.layers)
        if plan.budgets == "even":
            budgets = [mean] * layers
        else:
            budgets = proportional_budgets(self.claims, mean, min(10 * mean, prefix))
        local = self.local(plan.local, plan.kernel, plan.context)
        if plan.share > 0:
            voted = self.voted(plan)
            # Ties within a run: the earlier position first, as everywhere.
            best = top_positions(voted[None], int(plan.share * mean))[0]
            raised = torch.zeros_like(voted)
            raised[best] = 2 + voted[best]
            local = [scores + raised for scores in local]
        window = torch.arange(prefix, self.length, device=local[0].device)
        kept = [
            torch.cat([chosen, window.expand(len(chosen), -1)], dim=1)
            for chosen in top_positions_of_layers(local, budgets)
        ]
        return Retention(indices=tuple(kept), prompt_length=self.length)


def plans() -> list[Plan]:
    """What is tried."""
    found = [
        Plan(),
        Plan(budgets="even"),
        Plan(share=0.0, kernel=31),
        Plan(share=0.0, local="max"),
        Plan(share=0.0, local="ctx"),
    ]
    for share in (0.25, 0.75, 0.9):
        found += [Plan(share=share), Plan(share=share, budgets="even")]
    for votes in ("ctx", "std", "square", "maxrise", "squarerise"):
        found.append(Plan(votes=votes))
    for heads in ("mass", "cube", "sharp", "shift square"):
        found.append(Plan(heads=heads))
    for smooth, back, forward in (
        (1, 0, 32), (17, 0, 32), (9, 0, 0), (9, 0, 16), (9, 0, 48), (9, 8, 32), (17, 0, 16),
        (33, 0, 0), (33, 0, 16),
    ):  # fmt: skip
        found.append(Plan(smooth=smooth, back=back, forward=forward))
    found += [
        Plan(context=16),
        Plan(context=64),
        Plan(context=64, votes="maxrise"),
        Plan(local="ctx"),
        Plan(local="max"),
        Plan(lexical=0.5),
        Plan(lexical=1.0),
        Plan(context=64, forward=48),
        Plan(context=64, forward=64),
        Plan(context=64, forward=48, votes="square"),
        Plan(context=64, forward=48, votes="square", heads="shift square"),
        Plan(context=64, forward=48, votes="square", back=8),
        Plan(context=64, forward=48, votes="square", share=0.75),
        Plan(context=64, forward=48, votes="square", budgets="even"),
        Plan(context=64, forward=48, smooth=17, votes="square"),
        Plan(context=64, forward=48, votes="squarerise"),
        Plan(context=32, forward=48, votes="square"),
        Plan(context=32, forward=64, votes="square"),
    ]
    return list(dict.fromkeys(found))


def second_plans() -> list[Plan]:
    """What is tried after the first results: the best of each kind joined."""
    best: dict[str, Any] = {"heads": "shift square", "share": 0.75}
    changes: list[dict[str, Any]] = [
        {},
        {"share": 0.5},
        {"share": 0.9},
        {"forward": 48},
        {"forward": 24},
        {"forward": 48, "share": 0.9},
        {"heads": "shift cube"},
        {"heads": "shift cube", "share": 0.9},
        {"budgets": "even"},
        {"context": 24},
        {"context": 48},
        {"context": 48, "forward": 48},
        {"smooth": 5},
        {"smooth": 13},
        {"votes": "square"},
        {"decay": 0.5},
        {"decay": 0.5, "forward": 48},
        {"decay": 0.5, "forward": 64},
        {"decay": 0.9, "forward": 48},
        {"decay": 0.9, "forward": 64},
        {"decay": 0.9, "forward": 64, "share": 0.9},
        {"decay": 0.9, "forward": 64, "heads": "shift cube"},
        {"lexical": 0.5},
    ]
    return [Plan(**{**best, **change}) for change in changes]


def references(capacity: int) -> dict[str, dkv.CompressionMethod]:
    """What is there already."""
    return {
        "SnapKV": dkv.SnapKV(capacity=capacity),
        "SnapKV, kernel 63": dkv.SnapKV(capacity=capacity, kernel_size=63),
        "CAKE": dkv.CAKE(capacity=capacity),
        "ShiftKV": dkv.ShiftKV(capacity=capacity),
        "ShiftKV, kernel 63": dkv.ShiftKV(capacity=capacity, kernel_size=63),
    }


Prompt = tuple[Prefill, tuple[str, ...], int]
"""What was read, the texts that the answer should hold (none: any answer), longest answer."""


def essays(folder: Path) -> None:
    """Prose to hide facts in, as .txt files."""
    for path in [*TEXTS.glob("tasks/prose-*.txt"), *TEXTS.glob("examples/*.txt")]:
        if path.stem not in ("code", "few-shot", "needle-3k"):
            (folder / path.name).write_text(path.read_text("utf-8"), "utf-8")


TASKS: dict[str, tuple[str, int, list[int]]] = {
    "needle 2K": ("needle", 2048, [64, 128]),
    "needle 4K": ("needle", 4096, [64, 128]),
    "multikey_3 4K": ("niah_multikey_3", 4096, [128, 512]),
    "multikey_2 4K": ("niah_multikey_2", 4096, [128, 256]),
    "single_3 4K": ("niah_single_3", 4096, [64, 128]),
    "multiquery 4K": ("niah_multiquery", 4096, [128, 256]),
    "news": ("news", 0, [128, 512]),
    "needle 1K": ("needle", 1024, [64, 128]),
    "multikey_3 1K": ("niah_multikey_3", 1024, [256]),
    "multikey_3 2K": ("niah_multikey_3", 2048, [256, 512]),
    "multikey_2 2K": ("niah_multikey_2", 2048, [128, 256]),
}


def read_prompt(llm: dkv.LoadedModel, task: str, sample: int, seed: int, folder: Path) -> Prompt:
    """One prompt of a task."""
    kind, length, _ = TASKS[task]
    recording = {**recording_for([dkv.SnapKV(capacity=64)]), "tail": 2 * CONTEXT}
    if kind == "needle":
        grid = NeedleGrid(lengths=(length,), haystack=str(folder), seed=seed)
        experiment = NeedleExperiment(llm, grid)
        depth = random.Random(f"{seed}-{sample}").randrange(5) / 4
        document, hidden = experiment.document({"length": length, "depth": depth, "sample": sample})
        read = prefill(llm, document, hidden.question, chat_template=True, **recording)
        return read, hidden.expected, 32
    if kind == "news":
        example = read_tasks(DATA, ["multi_news"], None, False)[sample % 20]
        text = Protocol.official().prompt(example)
        return prefill_text(llm, text, limit=4096, **recording), (), 64
    (made,) = make_examples(
        kind,
        length,
        1,
        lambda text: len(llm.tokenizer(text)["input_ids"]),
        haystack=Haystack(str(folder)),
        seed=1000 * seed + sample,
    )
    text = f"{made.opening}\n{made.question}{made.answer_prefix}"
    return prefill_text(llm, text, **recording), made.answers, 112


@torch.inference_mode()
def measure(llm: dkv.LoadedModel, prompt: Prompt, capacities: list[int], wanted: list[Plan]) -> Row:
    """One prompt under every candidate."""
    read, expected, longest = prompt
    everything = dkv.FullKV().select(read.layers)
    cache = prune(read, everything, room=longest)
    answer = [s.token_id for s in decode(llm, cache, read.logits, read.length, longest)]
    del cache
    places = [digits_places(llm, answer, text) for text in expected]
    full = all(places)
    row: Row = {"tokens": read.length, "full": full, "answer": llm.tokenizer.decode(answer)}
    if expected and not full:
        return row
    if expected:
        answer = answer[: max(map(max, places)) + 1]
    flat = [place for found in places for place in found] or list(range(len(answer)))
    truth = torch.tensor(answer, device=llm.device)
    sure = forced_logits(llm, read, everything, answer).log_softmax(-1)
    seen = Read(read)
    row["runs"] = {}
    for capacity in capacities:
        found: dict[str, list[float]] = {}

        def judge(name: str, kept: Retention, found: dict[str, list[float]] = found) -> None:
            logits = forced_logits(llm, read, kept, answer).log_softmax(-1)
            right = logits.argmax(-1) == truth
            apart = (sure.exp() * (sure - logits)).sum(-1)[1:]
            found[name] = [
                float(right[flat].all()),
                round(float(right.float().mean()), 4),
                round(float(apart.mean()) if len(apart) else 0.0, 5),
                round(kept.kept_fraction, 5),
            ]

        for name, method in references(capacity).items():
            judge(name, method.select(read.recalling))
        for plan in wanted:
            judge(plan.name, seen.choose(plan, capacity))
        row["runs"][str(capacity)] = found
    return row


def units(tasks: list[str], samples: int) -> Iterator[tuple[str, int]]:
    """All prompts, tasks in turn."""
    for sample in range(samples):
        for task in tasks:
            yield task, sample


def table(paths: list[Path], least: int) -> None:
    """What files hold: per model, task and capacity every candidate, best first."""
    groups: dict[tuple[str, str, str], dict[str, list[list[float]]]] = {}
    ceiling: dict[tuple[str, str], list[bool]] = {}
    for path in paths:
        for line in path.read_text("utf-8").splitlines():
            row = json.loads(line)
            ceiling.setdefault((row["model"], row["task"]), []).append(row["full"])
            for capacity, found in row.get("runs", {}).items():
                group = groups.setdefault((row["model"], row["task"], capacity), {})
                for name, values in found.items():
                    group.setdefault(name, []).append(values)
    for (model, task, capacity), group in sorted(groups.items()):
        full = ceiling[model, task]
        print(f"\n{model} | {task} | capacity {capacity} | FullKV {sum(full)} of {len(full)}")
        if len(group["SnapKV"]) < least:
            continue
        yard = group["ShiftKV"]
        lines = []
        for name, values in group.items():
            gain = [a[0] - b[0] for a, b in zip(values, yard, strict=True)]
            closer = [b[2] - a[2] for a, b in zip(values, yard, strict=True)]
            means = [statistics.mean(column) for column in zip(*values, strict=True)]
            lines.append((means, bootstrap([gain]), bootstrap([closer]), name))
        for means, gained, closer, name in sorted(lines, key=lambda x: (-x[0][0], x[0][2])):
            print(
                f"  {100 * means[0]:5.1f} % ({100 * gained[0]:+.0f}..{100 * gained[1]:+.0f})"
                f"  match {100 * means[1]:5.1f}  KL {means[2]:.4f}"
                f" ({closer[0]:+.3f}..{closer[1]:+.3f})  kept {means[3]:.4f}  {name}"
            )


def record(paths: list[Path], where: str) -> None:
    """benchmarks/results/search.md: what every candidate found of what FullKV finds, per cent, and
    of news articles the KL divergence, best first."""
    found: dict[str, dict[str, list[float]]] = {}
    full: dict[str, list[bool]] = {}
    for path in paths:
        for line in path.read_text("utf-8").splitlines():
            row = json.loads(line)
            task = f"{row['model']}, {row['task']}"
            full.setdefault(task, []).append(row["full"])
            for capacity, runs in row.get("runs", {}).items():
                for name, (right, _, apart, _) in runs.items():
                    value = apart if row["task"] == "news" else 100 * right
                    cell = f"{task}, {capacity}"
                    found.setdefault(name, {}).setdefault(cell, []).append(value)
    enough = {task for task, hits in full.items() if statistics.mean(hits) >= 0.5}
    cells = sorted({c for f in found.values() for c in f if c.rpartition(", ")[0] in enough})
    means = {
        name: {cell: statistics.mean(held[cell]) for cell in cells if cell in held}
        for name, held in found.items()
    }
    shares = {
        name: statistics.mean(value for cell, value in of.items() if "news" not in cell)
        for name, of in means.items()
    }
    lines = [["candidate", "mean", *cells]]
    for name in sorted(found, key=lambda name: -shares[name]):
        told = [f"{means[name][c]:.3g}" if c in means[name] else "-" for c in cells]
        lines.append([name, f"{shares[name]:.1f}", *told])
    prompts = "; ".join(f"{task}: {sum(hits)} of {len(hits)}" for task, hits in full.items())
    text = (
        f"# The search for VoteKV\n\n`python -m benchmarks.search`: {where}. Found of what FullKV "
        "finds, per cent, teacher-forced, and the mean over those columns; of news the KL "
        "divergence from FullKV's answer. Each column is a model, a task and a capacity. Prompts "
        f"that FullKV answers rightly: {prompts}. Columns in which that is less than half are left "
        "out. What the names say is in `Plan`; VoteKV is `vote(heads=shift square, share=0.75)`, "
        "which joins two of these and was not tried here itself.\n\n"
        f"{markdown(lines)}\n"
    )
    (RESULTS / "search.md").write_text(text, "utf-8")


DEVELOPMENT = {
    "qwen": (5, "multikey_3 4K,needle 2K,multikey_2 4K,needle 4K,news"),
    "smollm2": (3, "needle 2K,needle 4K,news,multikey_2 2K"),
}
"""Of each model that is searched on: processes and tasks."""
SECOND = {
    "qwen": (5, "multikey_3 4K,multikey_2 4K,needle 4K,news"),
    "smollm2": (3, "needle 4K,needle 2K,news"),
}
"""In the second round; the first one left nothing to tell apart in the others."""


def all_at_once(options: argparse.Namespace) -> None:
    """Every process of the search, then the table."""
    began = time.perf_counter()
    out: Path = options.output
    logs = options.models / ("search-2" if options.second else "search")
    models = {name: options.models / f"{name}.gguf" for name in DEVELOPMENT}
    convert(list(models.values()), logs)
    left = options.seconds - (time.perf_counter() - began) - 15
    commands = {}
    for name, (processes, tasks) in (SECOND if options.second else DEVELOPMENT).items():
        for part in range(processes):
            arguments = ["--model", str(models[name]), "--tasks", options.tasks or tasks]
            arguments += ["--part", f"{part}/{processes}", "--seconds", f"{left:.0f}"]
            arguments += ["--output", str(logs / f"{name}-{part}.jsonl"), "--dtype", options.dtype]
            arguments += ["--seed", str(options.seed), "--samples", str(options.samples)]
            arguments += ["--plans", str(options.plans)] + ["--second"] * options.second
            commands[f"{name}-{part}"] = (
                [sys.executable, "-m", "benchmarks.search", *arguments],
                environment(models[name]),
            )
    if options.processes:
        commands = dict(list(commands.items())[: options.processes])
    parts = [logs / f"{name}.jsonl" for name in commands]

    def say() -> str:
        done = [len(part.read_text("utf-8").splitlines()) for part in parts if part.is_file()]
        return f"; {sum(done)} prompts"

    run(commands, logs, say)
    out.mkdir(parents=True, exist_ok=True)
    lines = "".join(part.read_text("utf-8") for part in parts if part.is_file())
    (out / "search.jsonl").write_text(lines, "utf-8")
    table([out / "search.jsonl"], 3)


def main() -> None:
    """Measure, or print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search")
    parser.add_argument("--table", nargs="*", type=Path)
    parser.add_argument("--record", metavar="WHERE", help="write --table's files down")
    parser.add_argument("--least", type=int, default=1, help="prompts below which none is shown")
    parser.add_argument("--models", type=Path, help="folder with qwen.gguf and smollm2.gguf")
    parser.add_argument("--processes", type=int, default=0, help="the first so many; 0 is all")
    parser.add_argument("--model", default=dkv.DEFAULT_MODEL)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tasks", default="")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--plans", type=int, default=0, help="the first so many; 0 is all")
    parser.add_argument("--second", action="store_true", help="the second round's candidates")
    parser.add_argument("--output", type=Path, default=Path("search.jsonl"))
    options = parser.parse_args()
    if options.table is not None and options.record:
        record(options.table, options.record)
    elif options.table is not None:
        table(options.table, options.least)
    elif options.models is not None:
        all_at_once(options)
    else:
        measure_part(options)


def measure_part(options: argparse.Namespace) -> None:
    """One process's prompts."""
    start = time.perf_counter()
    mine, of = map(int, options.part.split("/"))
    llm = dkv.load_model(options.model, dtype=options.dtype)
    wanted = (second_plans() if options.second else plans())[: options.plans or None]
    name = Path(llm.name).stem
    print(f"{name} {mine}: loaded after {time.perf_counter() - start:.0f} s", flush=True)
    tasks = (options.tasks or "needle 2K").split(",")
    with tempfile.TemporaryDirectory() as folder, options.output.open("a") as file:
        essays(Path(folder))
        for number, (task, sample) in enumerate(units(tasks, options.samples)):
            if number % of != mine:
                continue
            if time.perf_counter() - start > options.seconds:
                break
            began = time.perf_counter()
            prompt = read_prompt(llm, task, sample, options.seed, Path(folder))
            row = measure(llm, prompt, TASKS[task][2], wanted)
            seconds = round(time.perf_counter() - began, 2)
            row = {"model": name, "task": task, "sample": sample, "seconds": seconds, **row}
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(f"{name} {mine}: {task} {sample}, full {row['full']}, {seconds} s", flush=True)
    print(f"{name} {mine}: done after {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
