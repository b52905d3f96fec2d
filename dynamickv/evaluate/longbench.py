"""LongBench, and RULER's files, with every method from one prefill per example.
 The protocol is that of the paper's runs: the task's template around the example, no chat template
unless asked for, the first and last halves of a prompt that is too long, greedy decoding, the
official answer lengths and metrics.

Source: LongBench (Bai et al. 2024, arXiv:2308.14508); RULER (Hsieh et al. 2024, arXiv:2404.06654).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamickv.answer import recording_for
from dynamickv.evaluate.data import data_file
from dynamickv.evaluate.datasets import Example, task_of
from dynamickv.evaluate.experiment import Row, Stop, Unit, answers, entry, key, of_model, stopper
from dynamickv.evaluate.metrics import (
    METRICS,
    contains_all,
    contains_any,
    repetition,
    rouge_gives_up,
)
from dynamickv.methods import CompressionMethod
from dynamickv.models import LoadedModel
from dynamickv.reading.prefill import prefill_text


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How examples become prompts and how long answers may be."""

    prompts: Mapping[str, str]
    """Template per task, with {context} and {input}, in the format of LongBench's own file."""
    answer_lengths: Mapping[str, int]
    """Tokens per task."""
    chat_template: bool = False
    """Put the prompt into the chat template, except for few-shot and code tasks (as LongBench)."""
    max_length: int | None = None
    """Longest prompt in tokens; None: the paper's limit for a model of that many positions, or what
    the model reads, the answer included."""
    max_new_tokens: int | None = None
    """One answer length for all tasks instead of theirs."""

    @classmethod
    def official(
        cls,
        prompts: str | os.PathLike[str] | None = None,
        answer_lengths: str | os.PathLike[str] | None = None,
        **settings: Any,
    ) -> Protocol:
        """LongBench's own, or those of files in its format.

        Raises:
            ValueError: a file that is not one JSON object of texts or numbers.
        """
        return cls(
            prompts=_table(prompts, "longbench_prompts.json", str),
            answer_lengths=_table(answer_lengths, "longbench_max_new_tokens.json", int),
            **settings,
        )

    def prompt(self, example: Example) -> str:
        """The text that is fed."""
        if example.ruler:
            return example.fields["input"]
        template = self.prompts.get(example.task.removesuffix("_e"))
        if template is None:
            known = ", ".join(self.prompts)
            raise ValueError(
                f"there is no prompt template for task {example.task!r}; the file has {known}"
            )
        try:
            return template.format(**example.fields)
        except (LookupError, ValueError, AttributeError):
            raise ValueError(
                f"the prompt template for task {example.task!r} has other fields than "
                "{context} and {input}; mend the file"
            ) from None

    def parts(self, example: Example) -> tuple[str, str] | None:
        """The prompt as document and question: what the template ends with after the context asks.
        None where nothing follows it, and for RULER, whose prompts are one text.
        """
        if example.ruler:
            return None
        whole, context = self.prompt(example), example.fields["context"]
        before, found, after = whole.partition(context)
        if not context or not found or not after.strip():
            return None
        return before + context, after.strip()

    def answer_length(self, example: Example) -> int:
        """Most answer tokens."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if example.ruler:
            return int(_ruler(example.task)["max_new_tokens"])
        name = example.task.removesuffix("_e")
        if name not in self.answer_lengths:
            raise ValueError(
                f"there is no answer length for task {example.task!r}; add it to the file"
            )
        return self.answer_lengths[name]

    def limit(self, positions: int, answer_length: int) -> int:
        """Longest prompt for a model that reads so many positions.

        The authors' Llama-3 runs let prompt and answer exceed 8,192 together; here both fit.
        """
        if self.max_length is not None:
            return min(self.max_length, positions)
        paper = data_file("paper.json")["prompt_limits"].get(str(positions), positions)
        return int(min(paper, positions - answer_length))

    def with_chat_template(self, example: Example) -> bool:
        """Whether this example goes into the chat template."""
        if example.ruler or not self.chat_template:
            return self.chat_template
        return not task_of(example.task).get("never_chat", False)


class LongBenchExperiment:
    """Examples on a model."""

    def __init__(self, llm: LoadedModel, examples: Sequence[Example], protocol: Protocol) -> None:
        self._llm, self._examples, self._protocol = llm, examples, protocol
        self._by_key = {key(self._unit(example)): example for example in examples}
        for example in {example.task: example for example in examples}.values():
            protocol.prompt(example)
            length = protocol.answer_length(example)
            if protocol.limit(llm.geometry.max_positions, length) < 2:
                raise ValueError(
                    f"an answer of {length} tokens leaves no room for a prompt in this model "
                    f"({llm.geometry.max_positions} positions); set a lower --max-new-tokens"
                )

    @property
    def settings(self) -> dict[str, Any]:
        """What an example's result depends on besides the example and the method."""
        llm, protocol = self._llm, self._protocol
        prompts = hashlib.sha256(key(dict(protocol.prompts)).encode("utf-8")).hexdigest()[:16]
        return {
            "experiment": "longbench",
            **of_model(llm),
            "prompts": prompts,
            "chat_template": protocol.chat_template,
            "max_length": protocol.max_length,
            "max_new_tokens": protocol.max_new_tokens,
        }

    def units(self) -> list[Unit]:
        """Every example."""
        return [self._unit(example) for example in self._examples]

    def _unit(self, example: Example) -> Unit:
        return {"task": example.task, "id": example.id}

    def size(self, unit: Unit) -> float:
        """Characters of the prompt, and the answer as if it were prompt."""
        example = self._by_key[key(unit)]
        text = sum(map(len, example.fields.values()))
        return float(text + 40 * self._protocol.answer_length(example))

    def measure(self, unit: Unit, methods: Sequence[CompressionMethod], stop: Stop) -> Row:
        """One example."""
        example, protocol = self._by_key[key(unit)], self._protocol
        answer_length = protocol.answer_length(example)
        read = prefill_text(
            self._llm,
            protocol.prompt(example),
            limit=protocol.limit(self._llm.geometry.max_positions, answer_length),
            chat_template=protocol.with_chat_template(example),
            **recording_for(methods),
            on_layer=stopper(stop),
        )
        runs = answers(self._llm, read, methods, answer_length, stop)
        return {
            "prompt_tokens": read.length,
            "truncated": read.prompt.truncated,
            "prefill_seconds": round(read.seconds + read.mass_seconds, 3),
            "runs": [{**entry(run), **scored(example, run.answer)} for run in runs],
        }


def scored(example: Example, answer: str) -> Row:
    """What a journal keeps of an answer's worth: the official score, how much of it is repetition,
    which ROUGE does not see, and whether the official scorer gives up on it."""
    row: Row = {"score": score(example, answer), "repetition": round(repetition(answer), 6)}
    metric = None if example.ruler else task_of(example.task)["metric"]
    if metric in ("rouge_l", "rouge_l_zh") and row["score"] == 0 and answer.strip():
        segmented = metric == "rouge_l_zh"
        if any(rouge_gives_up(answer, truth, segmented) for truth in example.answers):
            row["gave_up"] = True
    return row


def score(example: Example, answer: str) -> float:
    """An answer's official score in [0, 1]: the best over the example's answers."""
    if example.ruler:
        judge = contains_any if _ruler(example.task)["any"] else contains_all
        return judge(answer, example.answers)
    task = task_of(example.task)
    if task.get("first_line", False):
        answer = answer.lstrip("\n").split("\n")[0]
    metric = METRICS[task["metric"]]
    return max(metric(answer, truth, all_classes=example.all_classes) for truth in example.answers)


def _ruler(task: str) -> Mapping[str, Any]:
    table = data_file("ruler.json")
    kind: Mapping[str, Any] = table.get(task.partition("_")[0], table["other"])
    return kind if isinstance(kind, dict) else table["other"]


def _table(path: str | os.PathLike[str] | None, standard: str, kind: type) -> dict[str, Any]:
    if path is None:
        return dict(data_file(standard))
    try:
        table = json.loads(Path(path).read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); give a file like LongBench's") from None
    if not isinstance(table, dict) or not all(isinstance(value, kind) for value in table.values()):
        raise ValueError(
            f"{path} is no table from task to {kind.__name__}; give a file like LongBench's"
        )
    return table
