"""The commands needle, longbench, ruler, sweep, tasks, turns and forgetting.
 Each writes what it measures to a .jsonl file at once and continues such a file when started again.
Under `accelerate launch` the processes share the work, and the first one writes the tables.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dynamickv.answer import recording_for
from dynamickv.evaluate import tables
from dynamickv.evaluate.about import circumstances
from dynamickv.evaluate.arguments import listed, output_file, settings_of
from dynamickv.evaluate.datasets import hub_folder, read_tasks
from dynamickv.evaluate.experiment import Experiment, Row, methods_at, rows_of, run
from dynamickv.evaluate.forgetting import (
    ForgettingExperiment,
    forgetting_csv,
    forgetting_summary,
    forgetting_table,
    require_forgetting,
)
from dynamickv.evaluate.haystack import Haystack, Hidden
from dynamickv.evaluate.journal import Journal, write_whole
from dynamickv.evaluate.kvpress_results import write_results
from dynamickv.evaluate.longbench import LongBenchExperiment, Protocol
from dynamickv.evaluate.metrics import require_libraries
from dynamickv.evaluate.needle import NeedleExperiment, NeedleGrid, even_depths
from dynamickv.evaluate.ruler import COLUMNS, lines, make_examples, ruler_tasks
from dynamickv.evaluate.share import Share
from dynamickv.evaluate.summary import longbench_summary, needle_summary
from dynamickv.evaluate.sweep import SweepExperiment, sweep_csv, sweep_summary
from dynamickv.evaluate.tasks import (
    TaskExperiment,
    is_questions,
    read_documents,
    read_questions,
    tasks_summary,
)
from dynamickv.evaluate.turns import TurnsExperiment, require_documents
from dynamickv.evaluate.turns_data import Documents, KeyValues, read_folder, read_questions_file
from dynamickv.evaluate.turns_summary import turns_summary, turns_table
from dynamickv.methods import CompressionMethod
from dynamickv.models import LoadedModel, load_model
from dynamickv.reading.prompt import require_longer_document, require_text
from dynamickv.record.checks import YARDSTICK


def needle(options: argparse.Namespace) -> None:
    """A needle grid."""
    require_libraries()
    methods = _methods(options)
    custom = None
    if options.needle is not None:
        if options.question is None or options.expected is None:
            raise ValueError("--needle needs --question and --expected; give all three")
        custom = Hidden((options.needle,), options.question, (options.expected,))
    grid = NeedleGrid(
        lengths=tuple(_numbers("--lengths", options.lengths)),
        depths=_depths(options.depths),
        samples=options.samples,
        needles=options.needles,
        haystack=options.haystack,
        custom=custom,
        max_new_tokens=options.max_new_tokens,
        chat_template=not options.no_chat_template,
        seed=options.seed,
    )
    output = _output_file(options.output)
    share = Share.of_this_process()
    llm = _load(options, share)
    experiment = NeedleExperiment(llm, grid)
    rows = _measured(experiment, methods, output.with_suffix(".jsonl"), share)
    if rows is not None:
        summary = needle_summary(rows)
        _write(output, llm, share, summary, experiment.settings)
        print(tables.needle_table(summary))


def longbench(options: argparse.Namespace) -> None:
    """LongBench's or RULER's files."""
    require_libraries()
    methods = _methods(options)
    protocol = Protocol.official(
        options.prompts,
        options.answer_lengths,
        chat_template=options.chat_template,
        max_length=options.max_length,
        max_new_tokens=options.max_new_tokens,
    )
    tasks = listed(options.tasks or "")
    folder = hub_folder() if options.data is None else options.data
    examples = read_tasks(folder, tasks, options.limit, options.skip_malformed)
    output = _output_folder(options.output)
    share = Share.of_this_process()
    llm = _load(options, share)
    experiment = LongBenchExperiment(llm, examples, protocol)
    rows = _measured(experiment, methods, output / "results.jsonl", share)
    if rows is not None:
        summary = longbench_summary(rows)
        _write(output / "summary.json", llm, share, summary, experiment.settings)
        write_whole(output / "scores.csv", tables.longbench_csv(summary))
        if options.kvpress is not None:
            write_results(Path(options.kvpress), examples, rows, llm.name, Path(folder).name)
        print(tables.longbench_table(summary))


def ruler(options: argparse.Namespace) -> None:
    """Files of RULER's needle tasks, with the lengths that this model's tokenizer gives them."""
    names = listed(options.tasks or "") or ruler_tasks()
    for name in names:
        if name not in ruler_tasks():
            raise ValueError(f"there is no task {name!r}; choose from {', '.join(ruler_tasks())}")
    if options.columns not in COLUMNS:
        raise ValueError(f"--columns must be one of {', '.join(COLUMNS)}, got {options.columns!r}")
    lengths = _numbers("--lengths", options.lengths)
    haystack = Haystack(options.haystack)
    output = _output_folder(options.output)
    tokenizer = _load(options, Share()).tokenizer
    print(f"{'task':16} {'asked':>6} {'tokens, prompt and answer':>26}")
    for length in lengths:
        for name in names:
            made = list(
                make_examples(
                    name,
                    length,
                    options.samples,
                    lambda text: len(tokenizer(text)["input_ids"]),
                    haystack=haystack,
                    seed=options.seed,
                )
            )
            (output / str(length)).mkdir(exist_ok=True)
            write_whole(output / str(length) / f"{name}.jsonl", lines(made, options.columns, name))
            used = [one.length for one in made]
            print(f"{name:16} {length:>6} {f'{min(used)} to {max(used)}':>26}")
    print(f"python -m dynamickv longbench --data {output / str(lengths[0])} scores them.")


def sweep(options: argparse.Namespace) -> None:
    """One document at many capacities."""
    document = options.read_text(options.document)
    require_text("document", document)
    require_text("question", options.question)
    require_longer_document(document, options.question)
    names = [name for name in listed(options.methods) if name != YARDSTICK]
    capacities = None if options.capacity is None else _numbers("--capacity", options.capacity)
    methods = methods_at(names, [(capacities or [16])[0]])
    output = _output_file(options.output)
    llm = _load(options, Share())
    experiment = SweepExperiment(
        llm, document, options.question, capacities, options.max_new_tokens, options.truncate
    )
    experiment.prepare(**recording_for(methods))
    rows = _measured(experiment, methods, output.with_suffix(".jsonl"), Share())
    lines = sweep_summary(rows or [])
    _write(output, llm, Share(), lines, experiment.settings)
    write_whole(output.with_suffix(".csv"), sweep_csv(lines))
    print(tables.sweep_table(lines))


def tasks(options: argparse.Namespace) -> None:
    """Budgets of several tasks over several documents."""
    folder = Path(options.documents)
    documents = read_documents(folder)
    own = read_questions(folder, documents)
    questions = None
    if options.questions is not None:
        questions = json.loads(options.read_text(options.questions))
        if not is_questions(questions):
            raise ValueError(f"{options.questions} is no table from a task's name to its question")
    methods = _methods(options)
    output = _output_file(options.output)
    share = Share.of_this_process()
    llm = _load(options, share)
    experiment = TaskExperiment(llm, documents, questions, own)
    rows = _measured(experiment, methods, output.with_suffix(".jsonl"), share)
    if rows is not None:
        summary = [tasks_summary(rows, method.name) for method in methods]
        asked = {"capacity": methods[0].parameters.get("capacity")}
        _write(output, llm, share, summary, experiment.settings | asked)
        print("\n\n".join(map(tables.tasks_table, summary)))


def turns(options: argparse.Namespace) -> None:
    """Several questions about each document, on three caches."""
    methods = _methods(options)
    documents = _documents(options)
    require_documents(documents)
    output = _output_file(options.output)
    share = Share.of_this_process()
    llm = _load(options, share)
    experiment = TurnsExperiment(llm, documents, options.max_new_tokens, options.truncate)
    rows = _measured(experiment, methods, output.with_suffix(".jsonl"), share)
    if rows is not None:
        summary = turns_summary(rows)
        _write(output, llm, share, summary, experiment.settings)
        print(turns_table(summary))


def forgetting(options: argparse.Namespace) -> None:
    """Given texts fed to caches of fixed size."""
    methods = _methods(options)
    require_forgetting(methods, options.buffer)
    texts: dict[str, str] = {}
    for name in listed(options.document):
        text = options.read_text(name)
        require_text("document", text)
        texts[Path(name).stem] = text
    if not texts:
        raise ValueError("--document names no file; give at least one")
    output = _output_file(options.output)
    share = Share.of_this_process()
    llm = _load(options, share)
    experiment = ForgettingExperiment(
        llm, texts, options.prompt_tokens, options.answer_tokens, options.buffer
    )
    rows = _measured(experiment, methods, output.with_suffix(".jsonl"), share)
    if rows is not None:
        summary = forgetting_summary(rows)
        _write(output, llm, share, summary, experiment.settings)
        write_whole(output.with_suffix(".csv"), forgetting_csv(summary))
        print(forgetting_table(summary))


def _documents(options: argparse.Namespace) -> Documents:
    """Documents and their questions, as the options name them."""
    if (options.document is None) != (options.questions is None):
        given, lacking = ("--document", "--questions")
        if options.document is None:
            given, lacking = lacking, given
        raise ValueError(f"{given} needs {lacking}; give both")
    if options.document is not None:
        if options.data is not None:
            raise ValueError("--data brings documents of its own; leave --document or --data out")
        text = options.read_text(options.document)
        require_text("document", text)
        asked = read_questions_file(Path(options.questions))
        return {Path(options.document).stem: (text, asked)}
    if options.data is not None:
        return read_folder(Path(options.data), options.limit)
    return KeyValues(
        samples=options.samples, pairs=options.pairs, questions=options.asked, seed=options.seed
    ).documents()


def _measured(
    experiment: Experiment, methods: Sequence[CompressionMethod], path: Path, share: Share
) -> list[Row] | None:
    """Measure what is missing, with a progress bar; all rows in the first process, None in
    others."""
    journal = Journal(path, share.rank)
    with tqdm(desc=path.stem, unit="unit", disable=not share.first) as bar:
        for step in run(experiment, methods, journal, share):
            bar.total = step.total
            bar.update(step.done - bar.n)
            if step.seconds_left is not None:
                bar.set_postfix_str(f"about {step.seconds_left / 60:.1f} min left")
    share.leave()
    if not share.first:
        return None
    return rows_of(journal, experiment.units())


def _write(
    path: Path, llm: LoadedModel, share: Share, summary: Any, settings: dict[str, Any]
) -> None:
    where = {**circumstances(llm), "processes": str(share.world)}
    record = {"circumstances": where, "settings": settings, "summary": summary}
    write_whole(path, json.dumps(record, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def _load(options: argparse.Namespace, share: Share) -> LoadedModel:
    spread = options.device_map
    return load_model(
        options.model,
        device="auto" if spread else share.device,
        dtype=options.dtype,
        device_map=spread,
        quantization=options.quantization,
        precision=options.precision,
    )


def _methods(options: argparse.Namespace) -> list[CompressionMethod]:
    return methods_at(
        listed(options.methods),
        _numbers("--capacity", options.capacity),
        **settings_of(options),
    )


def _numbers(option: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in listed(text)]
    except ValueError:
        raise ValueError(f"{option} takes whole numbers, such as 64,128, got {text!r}") from None
    if not numbers or min(numbers) < 1:
        raise ValueError(f"{option} takes numbers of at least 1, such as 64,128, got {text!r}")
    return numbers


def _depths(text: str) -> tuple[float, ...]:
    try:
        if "," not in text and "." not in text:
            return even_depths(int(text))
        return tuple(float(part) for part in listed(text))
    except ValueError:
        raise ValueError(
            f"--depths takes a number of depths, such as 5, or depths such as 0,0.5,1, got {text!r}"
        ) from None


def _output_file(name: str) -> Path:
    if Path(name).suffix != ".json":
        raise ValueError(f"--output takes a name that ends in .json, got {name!r}")
    return output_file(name)


def _output_folder(name: str) -> Path:
    path = Path(name)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; give the name of a folder for the results")
    path.mkdir(parents=True, exist_ok=True)
    return path
