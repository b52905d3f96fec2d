"""Benchmark files -> examples: LongBench's JSONL, one file per task, and RULER's.

A line that cannot be used is an error with its file and line; it is skipped only on request.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import huggingface_hub

from dynamickv.evaluate.data import data_file
from dynamickv.models.conversion import cache_folder

log = logging.getLogger(__name__)

HUB_DATASET = "THUDM/LongBench"
KVPRESS_RULER = {"context", "question", "answer_prefix", "answer"}
"""Columns of simonjegou/ruler on the hub, which kvpress reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One line of a benchmark."""

    task: str
    id: str
    fields: dict[str, str]
    """LongBench: `context` and `input` for the task's prompt template. RULER: `input`, the
    prompt, also where a file has it in kvpress's columns."""
    answers: list[str]
    all_classes: list[str] | None
    ruler: bool


def longbench_tasks() -> list[str]:
    """LongBench's tasks in its order."""
    return list(data_file("longbench_tasks.json"))


def task_names(folder: str | os.PathLike[str]) -> list[str]:
    """Every task that the folder has a file for: LongBench's in its order, then the others.

    Raises:
        ValueError: no such folder, or no task in it.
    """
    place = Path(folder)
    if not place.is_dir():
        raise ValueError(f"there is no folder {folder}; give one with LongBench's .jsonl files")
    found = {path.stem for path in place.glob("*.jsonl")}
    found |= {path.parent.name for path in place.glob("*/validation.jsonl")}
    if not found:
        raise ValueError(
            f"the folder {folder} holds no .jsonl files; put one file per task into it"
        )
    known = [task for task in longbench_tasks() if task in found]
    return known + sorted(found - set(known))


def read_tasks(
    folder: str | os.PathLike[str],
    tasks: Sequence[str] = (),
    limit: int | None = None,
    skip_malformed: bool = False,
) -> list[Example]:
    """The first `limit` examples of every task; all tasks of the folder if none is named.

    Raises:
        ValueError: an unknown task, a malformed line, or a task without examples.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 example, got {limit}")
    held = task_names(folder)
    examples: list[Example] = []
    for task in dict.fromkeys(tasks or held):
        if task not in held:
            raise ValueError(
                f"there is no task {task!r} in {folder}; choose from {', '.join(held)}"
            )
        path = Path(folder) / f"{task}.jsonl"
        path = path if path.is_file() else Path(folder) / task / "validation.jsonl"
        examples += _read(path, task, limit, skip_malformed)
    return examples


def _read(path: Path, task: str, limit: int | None, skip_malformed: bool) -> list[Example]:
    with open(path, "rb") as file:
        return read_lines(file, str(path), task, limit, skip_malformed)


def read_lines(
    lines: Iterable[bytes],
    name: str,
    task: str,
    limit: int | None = None,
    skip_malformed: bool = False,
) -> list[Example]:
    """The first `limit` examples of a task's file, which errors call `name`.

    Raises:
        ValueError: a malformed line, or no examples.
    """
    examples: list[Example] = []
    known: set[str] = set()
    skipped = 0
    for number, line in enumerate(lines, start=1):
        if limit is not None and len(examples) == limit:
            break
        if not line.strip():
            continue
        try:
            example = _example(line, task)
            if example.id in known:
                example = replace(example, id=f"{example.id}, line {number}")
            known.add(example.id)
            examples.append(example)
        except ValueError as fault:
            if not skip_malformed:
                raise ValueError(
                    f"{name}, line {number}: {fault}; mend the line, or skip malformed lines "
                    "with --skip-malformed on the command line"
                ) from None
            skipped += 1
            log.warning("%s, line %d: %s; skipped", name, number, fault)
    if not examples:
        rest = f", {skipped} malformed ones left out" if skipped else ""
        raise ValueError(f"{name} holds no examples{rest}; choose a file that has some")
    return examples


def _example(line: bytes, task: str) -> Example:
    try:
        row = json.loads(line)
    except UnicodeDecodeError:
        raise ValueError("the line is not UTF-8") from None
    except ValueError as error:
        raise ValueError(f"the line is not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"the line is JSON, but {type(row).__name__} and no object")
    if row.keys() >= KVPRESS_RULER:
        row = _as_ruler(row)
    ruler = "outputs" in row
    if not ruler and task_of(task) is None:
        known = ", ".join(longbench_tasks())
        raise ValueError(
            f"{task!r} is no task of LongBench ({known}), and without 'outputs' it is none of RULER"
        )
    needed = ("input",) if ruler else ("context", "input")
    fields = {name: _text(row, name) for name in needed}
    if ruler:
        fields["input"] += row.get("answer_prefix") or ""
    if not any(text.strip() for text in fields.values()):
        raise ValueError("the prompt is empty")
    name = "outputs" if ruler else "answers"
    answers = [row[name]] if isinstance(row.get(name), str) else _texts(row, name)
    classes = None if row.get("all_classes") is None else _texts(row, "all_classes")
    if not ruler and task_of(task)["metric"] == "classification" and not classes:
        raise ValueError("'all_classes' is missing, which this task needs")
    given = row.get("_id") or row.get("index")
    digest = hashlib.sha256(line.strip()).hexdigest()[:16]
    return Example(
        task=task,
        id=str(digest if given is None else given),
        fields=fields,
        answers=answers,
        all_classes=classes,
        ruler=ruler,
    )


def _as_ruler(row: dict[str, Any]) -> dict[str, Any]:
    """A row of kvpress's RULER (context, question, answer_prefix, answer) as RULER's own files have
    it: kvpress cut the prompt into the three, and left white space out where it cut."""
    prompt = _joined(_text(row, "context"), "\n", _text(row, "question"))
    prefix = row["answer_prefix"] or ""
    return {
        **row,
        "input": prompt,
        "answer_prefix": _joined(prompt, " ", prefix)[len(prompt) :],
        "outputs": row["answer"],
    }


def _joined(left: str, between: str, right: str) -> str:
    """Both texts, with something between them only where neither has white space."""
    apart = not left or not right or left[-1].isspace() or right[0].isspace()
    return f"{left}{'' if apart else between}{right}"


def task_of(name: str) -> Any:
    """What is known of a LongBench task (its length-balanced "_e" variant is scored alike), or
    None."""
    return data_file("longbench_tasks.json").get(name.removesuffix("_e"))


def _text(row: dict[str, Any], name: str) -> str:
    if not isinstance(row.get(name), str):
        raise ValueError(f"'{name}' is not a text")
    return str(row[name])


def _texts(row: dict[str, Any], name: str) -> list[str]:
    value = row.get(name)
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise ValueError(f"'{name}' is not a list of texts")
    return list(value)


def hub_folder() -> Path:
    """LongBench from the hub, unpacked once into the cache folder.

    Raises:
        ValueError: the hub cannot be reached, or what it gave is no archive of tasks.
    """
    target = cache_folder() / "longbench"
    if target.is_dir():
        return target
    try:
        archive = huggingface_hub.hf_hub_download(HUB_DATASET, "data.zip", repo_type="dataset")
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError):
        raise ValueError(
            f"the dataset {HUB_DATASET} is not on this machine and the hub cannot be reached; "
            "give --data DIR with LongBench's .jsonl files"
        ) from None
    target.parent.mkdir(parents=True, exist_ok=True)
    unpacked = Path(tempfile.mkdtemp(dir=target.parent, prefix=".longbench."))
    try:
        with zipfile.ZipFile(archive) as file:
            for member in file.infolist():
                name = Path(member.filename).name
                if name.endswith(".jsonl") and not name.startswith("."):
                    with file.open(member) as source, open(unpacked / name, "wb") as copy:
                        shutil.copyfileobj(source, copy)
        task_names(unpacked)
        unpacked.chmod(0o755)
        try:
            unpacked.rename(target)
        except OSError:
            if not target.is_dir():  # another process was faster
                raise
    except (zipfile.BadZipFile, ValueError):
        raise ValueError(
            f"the hub's archive of {HUB_DATASET} holds no tasks; give --data DIR"
        ) from None
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
    return target
