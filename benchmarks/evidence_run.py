"""The whole evidence on one GPU, several processes at once, resumable:
python -m benchmarks.evidence_run --models DIR --output DIR [--data DIR] [--seconds N]

DIR of models has qwen.gguf (Qwen2.5-Coder-0.5B-Instruct), gemma.gguf (Gemma-3-270M) and
smollm2.gguf (SmolLM2-135M-Instruct); DIR of data has LongBench's multi_news.jsonl and
passage_retrieval_zh.jsonl. Every answer goes at once to a journal below --output, packed as
evidence.tar.gz at the end; the same command with that file in --output goes on where it was.
`python -m benchmarks.evidence --collect FILE.tar.gz` makes the tables.

The processes share every part: each takes the next document that none has taken.

Parts, the most telling first (`PARTS`): needles and RULER's tasks, made with a seed that the search
did not see; LongBench; several questions about one document; one choice per query head, at the same
capacity and at the same bytes; prompts with and without the chat template.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tarfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import dynamickv as dkv
from benchmarks.side_by_side import convert, environment, run
from dynamickv.evaluate.about import circumstances
from dynamickv.evaluate.datasets import Example, read_tasks
from dynamickv.evaluate.experiment import Experiment, Measured, Row, Stop, Unit, key, methods_at
from dynamickv.evaluate.experiment import run as measured
from dynamickv.evaluate.haystack import Haystack
from dynamickv.evaluate.journal import Journal, write_whole
from dynamickv.evaluate.longbench import LongBenchExperiment, Protocol
from dynamickv.evaluate.needle import NeedleExperiment, NeedleGrid
from dynamickv.evaluate.ruler import make_examples, ruler_tasks
from dynamickv.evaluate.turns import TurnsExperiment
from dynamickv.evaluate.turns_data import read_folder
from dynamickv.methods import CompressionMethod
from dynamickv.models import LoadedModel

ROOT = Path(__file__).parent.parent
SEED = 20260
PACKED = "evidence.tar.gz"
CLAIMS = "claims"
"""Folder of empty files, one for each document that a process has taken."""
MODELS = ("qwen", "gemma", "smollm2")
RIVALS = ("StreamingLLM", "SnapKV", "PyramidKV", "DynamicKV", "CAKE", "LAVa", "KeyDiff")
"""The papers' methods. H2O is left out: it reads the attention of all queries, which takes longer
than all else together."""
OURS = ("ShiftKV", "VoteKV")
ALL = ("FullKV", *RIVALS, *OURS)
FEW = ("FullKV", "SnapKV", "PyramidKV", "DynamicKV", "CAKE", *OURS)
"""For long answers and the wider protocols."""


@dataclass(frozen=True)
class Setting:
    """What parts are built from."""

    llm: LoadedModel
    data: Path
    essays: Path
    """Folder of .txt files around the needles."""
    small: bool = False
    """A few short prompts, to try the command out."""

    def lengths(self, *wanted: int) -> tuple[int, ...]:
        """Those that the model reads with an answer behind them."""
        most = min(self.llm.geometry.max_positions - 160, 600 if self.small else 10**9)
        return tuple(length for length in wanted if length <= most) or (most,)


class Some:
    """Some units of an experiment."""

    def __init__(self, whole: Experiment, units: list[Unit]) -> None:
        self._units = units
        self.settings, self.size, self.measure = whole.settings, whole.size, whole.measure

    def units(self) -> list[Unit]:
        """These."""
        return self._units


def documents(experiment: Experiment) -> list[Some]:
    """An experiment in the least parts: units of one document stay together, which is read once
    for them."""
    together: dict[str, list[Unit]] = {}
    for unit in experiment.units():
        together.setdefault(str(unit.get("document", unit)), []).append(unit)
    return [Some(experiment, units) for units in together.values()]


class RulerExperiment:
    """Examples that are made as they are measured: making one takes as long as reading it."""

    def __init__(
        self,
        setting: Setting,
        tasks: Sequence[str],
        samples: int,
        length: int,
        protocol: Protocol,
    ) -> None:
        self._llm, self._protocol, self._length = setting.llm, protocol, length
        self._haystack = Haystack(str(setting.essays))
        self._places = {
            key({"task": task, "id": f"{length}-{sample}"}): (task, sample)
            for sample in range(samples)
            for task in tasks
        }
        self.settings = self._of([]).settings

    def _of(self, examples: list[Example]) -> LongBenchExperiment:
        return LongBenchExperiment(self._llm, examples, self._protocol)

    def units(self) -> list[Unit]:
        """Every task of one sample after another."""
        return [json.loads(name) for name in self._places]

    def size(self, unit: Unit) -> float:
        """All are equal."""
        return 1.0

    def measure(self, unit: Unit, methods: Sequence[CompressionMethod], stop: Stop) -> Row:
        """Make an example and measure it."""
        task, sample = self._places[key(unit)]
        (made,) = make_examples(
            task,
            self._length,
            1,
            lambda text: len(self._llm.tokenizer(text)["input_ids"]),
            haystack=self._haystack,
            seed=SEED * 1000 + sample,
        )
        example = Example(
            task=task,
            id=unit["id"],
            fields={"input": f"{made.opening}\n{made.question}{made.answer_prefix}"},
            answers=list(made.answers),
            all_classes=None,
            ruler=True,
        )
        return self._of([example]).measure(unit, methods, stop)


Built = tuple[Experiment, list[CompressionMethod]]


def needle(
    setting: Setting,
    lengths: Sequence[int] = (1024, 2048, 4096, 8000, 16000),
    samples: int = 4,
    capacities: Sequence[int] = (64, 128, 256, 512),
    methods: Sequence[str] = ALL,
    template: bool = True,
) -> Built:
    """Needles in news articles."""
    grid = NeedleGrid(
        lengths=setting.lengths(*lengths),
        depths=(0.0, 0.25, 0.5, 0.75, 1.0),
        samples=1 if setting.small else samples,
        haystack=str(setting.essays),
        max_new_tokens=24,
        chat_template=template and setting.llm.tokenizer.chat_template is not None,
        seed=SEED,
    )
    return NeedleExperiment(setting.llm, grid), at_capacities(methods, capacities, (64, 128))


def at_capacities(
    methods: Sequence[str], capacities: Sequence[int], alone: Sequence[int]
) -> list[CompressionMethod]:
    """Every method at every capacity; LAVa at those of `alone`, as the attention of heads of unlike
    length is computed head by head."""
    others = methods_at([name for name in methods if name != "LAVa"], capacities)
    few = [size for size in capacities if size in alone]
    return others + (methods_at(["LAVa"], few) if "LAVa" in methods and few else [])


def heads(setting: Setting) -> Built:
    """One choice per KV head and per query head, at the same capacity and at the same bytes."""
    geometry = setting.llm.geometry
    group = geometry.num_query_heads // geometry.num_kv_heads
    names = ("SnapKV", "PyramidKV", "DynamicKV", *OURS)
    grid, _ = needle(setting, lengths=(2048, 4096), samples=4)
    per_kv = methods_at(["FullKV", *names], [64, 64 * group])
    per_query = methods_at(names, [64], granularity="query_head")
    return grid, [*per_kv, *per_query]


def ruler(
    setting: Setting,
    tasks: Sequence[str],
    samples: int,
    capacities: Sequence[int] = (64, 128, 256, 512),
    methods: Sequence[str] = ALL,
    length: int = 4096,
    template: bool = False,
) -> Built:
    """RULER's needle tasks, made here in its format."""
    if setting.small:
        tasks, samples, length = tasks[:1], min(samples, 2), 900
    protocol = Protocol.official(
        chat_template=template and setting.llm.tokenizer.chat_template is not None,
        max_new_tokens=8 if setting.small else None,
    )
    chosen = at_capacities(methods, capacities, (128, 512))
    return RulerExperiment(setting, tasks, samples, length, protocol), chosen


def longbench(
    setting: Setting,
    task: str,
    limit: int,
    capacities: Sequence[int],
    methods: Sequence[str],
    template: bool = False,
) -> Built:
    """One of LongBench's tasks."""
    examples = read_tasks(setting.data, [task], 2 if setting.small else limit)
    protocol = Protocol.official(
        chat_template=template and setting.llm.tokenizer.chat_template is not None,
        max_length=500 if setting.small else None,
        max_new_tokens=8 if setting.small else None,
    )
    whole = LongBenchExperiment(setting.llm, examples, protocol)
    return whole, methods_at(methods, capacities)


def turns(setting: Setting) -> Built:
    """Several questions about each of the texts of assets/tasks."""
    texts = read_folder(ROOT / "assets" / "tasks", 2 if setting.small else None)
    whole = TurnsExperiment(setting.llm, texts, 8 if setting.small else 32)
    names = ("FullKV", "SnapKV", "PyramidKV", "DynamicKV", *OURS)
    return whole, methods_at(names, [64, 128, 256])


Build = Callable[[Setting], Built]
ZH, NEWS = "passage_retrieval_zh", "multi_news"
OTHERS = [task for task in ruler_tasks() if task != "niah_multikey_3"]
SEARCHED = ("niah_multikey_3",)
WIDE = (64, 128, 512)
PARTS: list[tuple[str, str, Build]] = [
    ("qwen", "multikey", lambda s: ruler(s, SEARCHED, 40)),
    ("qwen", "needle", needle),
    ("gemma", "needle", lambda s: needle(s, samples=3, capacities=(64, 128))),
    ("smollm2", "needle", needle),
    ("qwen", "ruler", lambda s: ruler(s, OTHERS, 8)),
    ("qwen", "passage_retrieval_zh", lambda s: longbench(s, ZH, 40, WIDE, FEW)),
    ("qwen", "heads", heads),
    ("qwen", "multi_news", lambda s: longbench(s, NEWS, 20, WIDE, FEW)),
    ("qwen", "turns", turns),
    ("qwen", "needle-plain", lambda s: needle(s, (2048, 4096), 4, (64, 128), FEW, template=False)),
    ("qwen", "multikey-chat", lambda s: ruler(s, SEARCHED, 24, (128, 512), FEW, template=True)),
    ("qwen", f"{ZH}-chat", lambda s: longbench(s, ZH, 40, WIDE, FEW, True)),
    ("smollm2", "ruler", lambda s: ruler(s, OTHERS, 4, methods=FEW)),
    ("smollm2", "multi_news", lambda s: longbench(s, NEWS, 20, WIDE, FEW)),
    ("gemma", "ruler", lambda s: ruler(s, OTHERS, 4, methods=FEW)),
    ("qwen", "multi_news-chat", lambda s: longbench(s, NEWS, 20, (128, 512), FEW, True)),
    ("smollm2", "turns", turns),
    ("gemma", "multi_news", lambda s: longbench(s, NEWS, 20, (128, 512), FEW)),
    ("smollm2", "heads", heads),
    ("gemma", "heads", heads),
]
"""Model, name and what is measured, in the order in which it is: the most telling first, and at the
end short pieces, so that all processes end at about the same time."""


def write_essays(data: Path, folder: Path) -> None:
    """LongBench's news articles as .txt files, the texts around the needles."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, example in enumerate(read_tasks(data, ["multi_news"])):
        path = folder / f"{number:02}.txt"
        if not path.is_file():
            path.write_text(example.fields["context"], "utf-8")


def work(options: argparse.Namespace) -> None:
    """One process: its share of every part, in order, until its time is up."""
    began = time.perf_counter()

    def late() -> bool:
        return time.perf_counter() - began > options.seconds

    mine = options.part
    loaded: dict[str, LoadedModel] = {}
    for model, name, build in PARTS:
        if options.only and f"{model}/{name}" not in options.only.split(","):
            continue
        if late():
            break
        if model not in loaded:
            file = options.models / f"{model}.gguf"
            os.environ.update(environment(file))
            loaded[model] = dkv.load_model(file, dtype=options.dtype)
        setting = Setting(loaded[model], options.data, options.output / "essays", options.small)
        folder = options.output / "journals" / model
        folder.mkdir(parents=True, exist_ok=True)
        about = folder / "about.json"
        if mine == 0 and not about.is_file():
            shared_by = {"processes": str(options.processes)}
            write_whole(about, json.dumps(circumstances(loaded[model]) | shared_by))
        start = time.perf_counter()
        journal = Journal(folder / f"{name}.jsonl", mine)
        try:
            experiment, methods = build(setting)
            for step in shared(experiment, methods, journal, options.output / CLAIMS, late):
                row = {} if step.row is None else step.row["unit"]
                print(f"{time.perf_counter() - began:.0f} s: {model}/{name} {row}", flush=True)
        except Exception:  # the machine is lent: the other parts are measured all the same
            traceback.print_exc()
        print(f"{model}/{name}: {time.perf_counter() - start:.0f} s", flush=True)


def shared(
    experiment: Experiment,
    methods: Sequence[CompressionMethod],
    journal: Journal,
    claims: Path,
    late: Stop,
) -> Iterator[Measured]:
    """Measure the documents that no other process has taken, one after another."""
    for number, document in enumerate(documents(experiment)):
        if late():
            return
        try:
            (claims / f"{journal.path.parent.name}-{journal.path.stem}-{number}").touch(
                exist_ok=False
            )
        except FileExistsError:
            continue
        yield from measured(document, methods, journal, stop=late)


def unpack(packed: Path, folder: Path) -> None:
    """Journals of an earlier run, unless there are newer ones."""
    if packed.is_file() and not (folder / "journals").is_dir():
        with tarfile.open(packed) as archive:
            archive.extractall(folder, filter="data")


def pack(folder: Path, packed: Path) -> None:
    """All journals in one file."""
    whole = packed.with_suffix(".part")
    with tarfile.open(whole, "w:gz") as archive:
        archive.add(folder / "journals", "journals")
    os.replace(whole, packed)


def rows_measured(folder: Path) -> str:
    """How much there is."""
    files: Iterable[Path] = (folder / "journals").glob("*/*.jsonl")
    counts = [path.read_bytes().count(b"\n") - 1 for path in files]
    return f"; {sum(counts)} prompts"


def main() -> None:
    """Start the processes, or be one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence_run")
    parser.add_argument("--models", type=Path, required=True, help="folder with the .gguf files")
    parser.add_argument("--data", type=Path, default=ROOT / "benchmarks" / "data")
    parser.add_argument("--output", type=Path, required=True, help="where to work")
    parser.add_argument("--packed", type=Path, help=f"where {PACKED} goes; otherwise --output")
    parser.add_argument("--resume", type=Path, help=f"an earlier {PACKED}")
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=1e9, help="after which nothing is begun")
    parser.add_argument("--only", default="", metavar="MODEL/PART,...", help="otherwise all")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--small", action="store_true", help="a few short prompts")
    parser.add_argument("--part", type=int, help="be one process")
    options = parser.parse_args()
    if options.part is not None:
        work(options)
        return
    wanted = {row.split("/")[0] for row in options.only.split(",")} if options.only else MODELS
    files = [options.models / f"{model}.gguf" for model in MODELS if model in wanted]
    for file in files:
        if not file.is_file():
            parser.error(f"there is no file {file}; --models takes the folder with the .gguf files")
    began = time.perf_counter()
    options.output.mkdir(parents=True, exist_ok=True)
    packed = (options.packed or options.output) / PACKED
    unpack(options.resume or packed, options.output)
    (options.output / "journals").mkdir(exist_ok=True)
    # Of a run that was stopped: what it took and did not measure is anyone's again.
    shutil.rmtree(options.output / CLAIMS, ignore_errors=True)
    (options.output / CLAIMS).mkdir()
    write_essays(options.data, options.output / "essays")
    convert(files, options.output / "logs")
    left = options.seconds - (time.perf_counter() - began)
    commands = {}
    for part in range(options.processes):
        arguments = [sys.executable, "-m", "benchmarks.evidence_run", "--models", options.models]
        arguments += ["--data", options.data, "--output", options.output, "--dtype", options.dtype]
        arguments += ["--part", str(part), "--seconds", f"{left:.0f}"]
        arguments += ["--processes", options.processes]
        arguments += ["--only", options.only] + ["--small"] * options.small
        commands[f"{part}"] = (list(map(str, arguments)), environment(options.models / "any.gguf"))
    run(commands, options.output / "logs", lambda: rows_measured(options.output))
    for log in sorted((options.output / "logs").glob("[0-9]*.log")):
        said = log.read_text("utf-8", "replace").splitlines()
        print("\n".join(line for line in said if "Error" in line or line.endswith(" s"))[-600:])
    packed.parent.mkdir(parents=True, exist_ok=True)
    pack(options.output, packed)
    print(f"{packed}: {packed.stat().st_size / 2**20:.1f} MiB{rows_measured(options.output)}")


if __name__ == "__main__":
    main()
