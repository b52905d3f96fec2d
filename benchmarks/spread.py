"""python -m benchmarks.spread [--parts needle,longbench,killed,model] [--processes N] [--small]

The evaluation on several GPUs: whether processes that share the work find what one finds, also when
one of them is killed, and how much sooner. A model spread over the GPUs: whether it answers as on
one. Writes spread.json after every part, into benchmarks/results or --out; what it holds of the
same machine and day stays. Answers are in --work, so that parts can be measured by several
commands. Without GPUs the processes share the CPU: a dry run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

import dynamickv as dkv
from benchmarks.beyond import in_turn, say
from benchmarks.prompts import QUESTION, document_of
from benchmarks.report import RESULTS, Row, machine, publish
from dynamickv.cache import KVCache, prune
from dynamickv.decoding.cuda_graph import DecodeGraph, graphable
from dynamickv.decoding.decode import decode
from dynamickv.evaluate.journal import Journal

ROOT = Path(__file__).parent.parent
LOST = 3
"""Trials of a process after which it is killed."""
NEW_TOKENS = 48
"""Of the answers of the model that is spread."""


def command(name: str, options: argparse.Namespace, output: Path) -> list[str]:
    """One evaluation, as README gives it."""
    small = options.small
    asked = {
        "needle": [
            *("--lengths", "300,400" if small else "1024,2048,3072,4096"),
            *("--capacity", "32" if small else "64,128,256"),
            *("--depths", "5", "--max-new-tokens", "4" if small else "20"),
            *("--samples", str(options.samples or (8 if small else 20))),
        ],
        "longbench": [
            *("--data", str(ROOT / "benchmarks" / "data")),
            *("--max-new-tokens", "2" if small else "64"),
            *("--limit", "6" if small else "20"),
            *("--capacity", "32" if small else "128"),
            *(("--max-length", "300") if small else ()),
        ],
    }[name]
    target = output / f"{name}.json" if name == "needle" else output / name
    return [name, "--model", options.model, "--dtype", "float32", *asked, "--output", str(target)]


def journal(name: str, output: Path) -> Journal:
    """Where that command's results go."""
    return Journal(output / (f"{name}.jsonl" if name == "needle" else f"{name}/results.jsonl"))


def found(name: str, output: Path) -> dict[str, str]:
    """What was written of every unit, but for how long it took."""
    rows = [row for row in journal(name, output).read() if "unit" in row]
    return {
        json.dumps(row["unit"]): json.dumps(
            {key: value for key, value in row.items() if not key.endswith("seconds")}
        )
        for row in rows
    }


def told(name: str, output: Path) -> dict[str, Any]:
    """The summary, but for where and when."""
    path = output / (f"{name}.json" if name == "needle" else f"{name}/summary.json")
    summary: dict[str, Any] = json.loads(path.read_text("utf-8"))
    del summary["circumstances"]
    return summary


def alone(arguments: list[str]) -> float:
    """Seconds of one process on one device."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "dynamickv", *arguments], check=True, cwd=ROOT)
    return time.perf_counter() - began


def launched(arguments: list[str], processes: int) -> subprocess.Popen[bytes]:
    """The same under `accelerate launch`."""
    launcher = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
        *("--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"),
        *("--dynamo_backend", "no", "--main_process_port", "0", "-m", "dynamickv"),
    ]
    return subprocess.Popen([*launcher, *arguments], cwd=ROOT, start_new_session=True)


def together(arguments: list[str], processes: int) -> float:
    """Seconds of several processes."""
    began = time.perf_counter()
    if launched(arguments, processes).wait():
        raise SystemExit("the launched processes failed")
    return time.perf_counter() - began


def lose_one(name: str, arguments: list[str], output: Path, processes: int) -> int:
    """Kill the last process once it has measured a little; how many units were measured by then."""
    part = Journal(journal(name, output).path, processes - 1).own
    launcher = launched(arguments, processes)
    while not part.is_file() or len(part.read_bytes().splitlines()) <= LOST:
        if launcher.poll() is not None:
            raise SystemExit("the launched processes ended before one could be killed")
        time.sleep(0.05)
    for process in psutil.Process(launcher.pid).children(recursive=True):
        if process.environ().get("RANK") == str(processes - 1):
            process.kill()
    if launcher.wait() == 0:
        raise SystemExit("nobody noticed that a process was killed")
    return len(found(name, output))


def evaluation(name: str, options: argparse.Namespace) -> list[Row]:
    """One process and several: the same results, how much sooner, and how much sooner at most.

    What does not shrink with the processes is their start, loading the model and the tables: what
    the same command takes once nothing is left to measure.
    """
    number = options.processes
    one, many = (fresh(options.work / name / part) for part in ("one", "many"))
    of_one, of_many = command(name, options, one), command(name, options, many)
    shared, rest = together(of_many, number), together(of_many, number)
    say(
        f"{name}: {number} processes took {shared:.0f} s, {rest:.0f} s of them start, loading and "
        f"tables; one will take about {number * (shared - rest) + rest:.0f} s"
    )
    single, own = alone(of_one), alone(of_one)
    expected, got = found(name, one), found(name, many)
    answers = sum(len(json.loads(row)["runs"]) for row in expected.values())
    most = single / (rest + (single - own) / number)
    return [
        Row(
            f"{name}: the same results from {number} processes as from one",
            share_equal(expected, got) * (told(name, one) == told(name, many)), "", "1",
            f"{answers} answers, {len(expected)} prompts, and the summary, but for the times",
        ),
        Row(
            f"{name}: one process / {number}", single / shared, "x",
            ">= 6" if name == "needle" and number == 8 else "",
            f"{single:.0f} and {shared:.0f} s, {own:.0f} and {rest:.0f} s of them start, loading "
            f"and tables, which leave at most {most:.2f} x",
        ),
    ]  # fmt: skip


def killed(options: argparse.Namespace) -> list[Row]:
    """Several processes of which one is killed, and the same command again."""
    one, output = options.work / "needle" / "one", fresh(options.work / "killed")
    if not one.is_dir():
        alone(command("needle", options, fresh(one)))
    arguments = command("needle", options, output)
    before = lose_one("needle", arguments, output, options.processes)
    together(arguments, options.processes)
    same = share_equal(found("needle", one), found("needle", output))
    return [
        Row(
            f"needle: the same results after one process of {options.processes} was killed",
            same * (told("needle", one) == told("needle", output)), "", "1",
            f"{before} prompts were measured before, the rest after the restart",
        )
    ]  # fmt: skip


def share_equal(expected: dict[str, str], got: dict[str, str]) -> float:
    """How much of `expected` is in `got`, word for word with scores and bytes; 0 if that holds more
    or nothing was expected."""
    if not expected or set(got) - set(expected):
        return 0.0
    return sum(got.get(unit) == row for unit, row in expected.items()) / len(expected)


def spread_model(options: argparse.Namespace) -> list[Row]:
    """SmolLM2 on one GPU and on several, from its own pass and from the captured step."""
    gpus = torch.cuda.device_count()
    methods = [dkv.build_method(name, capacity=128) for name in dkv.METHODS if name != "Manual"]
    # Its projection to logits is the embedding table.
    places = {**in_turn(30, gpus), "lm_head": 0}
    traces: list[dkv.Trace] = []
    for place in ({"device": "cuda:0"}, {"device_map": places}):
        llm = dkv.load_model(options.model, dtype="float32", **place)  # type: ignore[arg-type]
        asked = document_of(llm, 2000), QUESTION
        traces.append(dkv.compare(llm, *asked, methods=methods, max_new_tokens=NEW_TOKENS))
    equal = [
        one.answer == other.answer and one.retained == other.retained
        for one, other in zip(traces[0].runs, traces[1].runs, strict=True)
    ]
    step = "captured step" if graphable(llm) else "plain path"
    note = f"answers and kept sets of {len(equal)} methods, 2,000 tokens, float32, {step}"
    rows = [
        Row(f"SmolLM2 over {gpus} GPUs: the same as on one", sum(equal) / len(equal), "", "1", note)
    ]
    read = dkv.prefill(llm, *asked, mass=any(method.needs_mass for method in methods))
    same = []
    for method, run in zip(methods, traces[0].runs, strict=True):
        cache = prune(read, method.select(read.layers), NEW_TOKENS)
        if cache.plain:
            same.append(captured_answer(llm, cache, read) == list(run.token_ids))
    note = f"answers of {len(same)} methods whose heads hold equally much, word for word"
    return [
        *rows,
        Row(
            f"SmolLM2 over {gpus} GPUs, captured step: the same as on one",
            sum(same) / len(same), "", "1", note,
        ),
    ]  # fmt: skip


def captured_answer(llm: dkv.LoadedModel, cache: KVCache, read: dkv.Prefill) -> list[int]:
    """The answer's tokens from a graph on every GPU."""
    graph = DecodeGraph(llm, cache, read.length, NEW_TOKENS)
    steps = decode(
        llm,
        cache,
        read.logits,
        read.length,
        NEW_TOKENS,
        advance=lambda token: (*graph.advance(token), 0.0),
    )
    return [step.token_id for step in steps]


def fresh(folder: Path) -> Path:
    """An empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def with_earlier(path: Path, where: dict[str, str], rows: list[Row]) -> list[Row]:
    """What a results file holds of the same machine and day, then these rows in place of older
    ones of the same name."""
    if not path.is_file():
        return rows
    held = json.loads(path.read_text("utf-8"))
    if any(held["machine"].get(name) != value for name, value in where.items() if name != "load"):
        return rows
    new = {row.measure for row in rows}
    return [Row(**row) for row in held["rows"] if row["measure"] not in new] + rows


PARTS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "needle": partial(evaluation, "needle"),
    "longbench": partial(evaluation, "longbench"),
    "killed": killed,
    "model": spread_model,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure everything and write it down."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.spread", description=__doc__)
    parser.add_argument("--model", default=dkv.models.DEFAULT_MODEL)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="short prompts and answers")
    parser.add_argument("--samples", type=int, help="needles per length and depth (20; small: 8)")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--work", type=Path, help="folder of the answers (one that is removed)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    parts = options.parts.split(",")
    for part in parts:
        if part not in PARTS:
            parser.error(f"there is no part {part!r}; choose from {', '.join(PARTS)}")
    cuda = torch.cuda.is_available()
    if "model" in parts and torch.cuda.device_count() < 2:
        if options.parts != parser.get_default("parts"):
            parser.error("the part 'model' needs two GPUs; leave it out of --parts")
        parts.remove("model")
    where = machine()
    name = "spread" if cuda else "spread-dry"
    with tempfile.TemporaryDirectory() as temporary:
        options.work = options.work or Path(temporary)
        if set(parts) - {"model"}:
            # Files are read from the disk and converted once, which is no process's own time.
            small = argparse.Namespace(**{**vars(options), "small": True, "samples": 1})
            alone(command("needle", small, fresh(options.work / "first")))
        for part in parts:
            say(part)
            rows = with_earlier(options.out / f"{name}.json", where, PARTS[part](options))
            publish(name, where, rows, options.out)


if __name__ == "__main__":
    main()
