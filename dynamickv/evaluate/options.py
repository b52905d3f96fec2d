"""The options of the measuring commands. What runs them is imported when one is chosen."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from dynamickv.evaluate.arguments import add_settings
from dynamickv.evaluate.tables import ORDER
from dynamickv.methods import METHODS
from dynamickv.models import DEFAULT_MODEL, QUANTIZATIONS
from dynamickv.models.precision import PRECISIONS

SIX = ",".join(ORDER)
"""The methods of the paper's tables, in its order."""
FIVE = SIX.partition(",")[2]
BESIDE = "what is measured goes at once to a .jsonl file beside it, from where a run goes on"


def add_commands(commands: Any, read_text: Callable[[str], str]) -> None:
    """Add needle, longbench, ruler, sweep, tasks, turns and forgetting to the command line.

    Args:
        commands: what `add_subparsers` returned.
        read_text: reads a text file by name, or raises ValueError.
    """
    for name, explanation, add in (
        ("needle", "hide facts at every depth of long texts and ask for them", _needle),
        ("longbench", "score LongBench's or RULER's files", _longbench),
        ("ruler", "make RULER's needle tasks, for longbench --data", _ruler),
        ("sweep", "one document at every capacity: agreement, KL, bytes", _sweep),
        ("tasks", "how budgets per layer follow the task", _tasks),
        ("turns", "several questions about one document: reuse a cache, or choose anew", _turns),
        ("forgetting", "a given text fed to caches of fixed size: what survives", _forgetting),
    ):
        parser = commands.add_parser(
            name, help=explanation, description=explanation, formatter_class=Help
        )
        parser.set_defaults(command=_chosen(name), read_text=read_text)
        parser.add_argument("--model", default=DEFAULT_MODEL, metavar="NAME", help="as in compare")
        parser.add_argument(
            "--dtype",
            default="auto",
            metavar="auto|float32|bfloat16|float16",
            help="of the weights; auto is float32 on a CPU and bfloat16 elsewhere",
        )
        parser.add_argument("--device-map", metavar="auto", help="spread the model over all GPUs")
        parser.add_argument(
            "--quantization",
            metavar="|".join(QUANTIZATIONS),
            help="pack the weights (bitsandbytes)",
        )
        parser.add_argument(
            "--precision",
            default="auto",
            metavar="|".join(PRECISIONS),
            help="of products on a CPU: fast rounds a prompt's as bfloat16",
        )
        add(parser)


def _chosen(name: str) -> Callable[[argparse.Namespace], None]:
    def run(options: argparse.Namespace) -> None:
        from dynamickv.evaluate import command

        getattr(command, name)(options)

    return run


def _needle(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lengths", default="1024,2048,4096", metavar="N,N", help="prompt tokens")
    parser.add_argument(
        "--depths", default="5", metavar="N|X,X", help="how many, or which (0 to 1)"
    )
    _add_methods(parser, SIX, "64,128,256")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="trials per cell")
    parser.add_argument("--needles", type=int, default=1, metavar="N", help="facts per text")
    parser.add_argument("--haystack", metavar="DIR", help=".txt files; otherwise made up")
    parser.add_argument("--needle", metavar="TEXT", help="a fact of your own")
    parser.add_argument("--question", metavar="TEXT", help="which asks for it")
    parser.add_argument("--expected", metavar="TEXT", help="what the answer must contain")
    parser.add_argument(
        "--max-new-tokens", type=int, default=32, metavar="N", help="longest answer in tokens"
    )
    parser.add_argument("--no-chat-template", action="store_true", help="feed plain text")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is made up")
    parser.add_argument(
        "--output", default="needle.json", metavar="FILE.json", help=f"summary; {BESIDE}"
    )


def _longbench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", metavar="DIR", help="one TASK.jsonl per task; otherwise LongBench from the hub"
    )
    parser.add_argument("--tasks", metavar="A,B", help="otherwise all in the folder")
    parser.add_argument("--limit", type=int, metavar="N", help="first N examples of every task")
    _add_methods(parser, SIX, "512")
    parser.add_argument("--prompts", metavar="FILE", help="templates in LongBench's format")
    parser.add_argument("--answer-lengths", metavar="FILE", help="tokens per task, in its format")
    parser.add_argument("--chat-template", action="store_true", help="not for few-shot and code")
    parser.add_argument("--max-length", type=int, metavar="N", help="longest prompt in tokens")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="for all tasks")
    parser.add_argument("--skip-malformed", action="store_true", help="leave out unusable lines")
    parser.add_argument(
        "--kvpress", metavar="DIR", help="also RULER's results as kvpress's evaluation writes them"
    )
    parser.add_argument(
        "--output", default="longbench", metavar="DIR", help="answers, scores and tables"
    )


def _ruler(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tasks", metavar="A,B", help="niah_single_1 and so on; otherwise all")
    parser.add_argument(
        "--lengths", default="4096", metavar="N,N", help="tokens of prompt and answer together"
    )
    parser.add_argument("--samples", type=int, default=20, metavar="N", help="examples per task")
    parser.add_argument("--haystack", metavar="DIR", help=".txt files; otherwise made up")
    parser.add_argument(
        "--columns", default="ruler", metavar="ruler|kvpress", help="whose column names"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is made up")
    parser.add_argument(
        "--output", default="ruler", metavar="DIR", help="a folder per length, a file per task"
    )


def _sweep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--document", required=True, metavar="FILE", help="UTF-8 text")
    parser.add_argument("--question", required=True, metavar="TEXT", help="about the document")
    parser.add_argument("--methods", default=FIVE, metavar="A,B", help=f"from {', '.join(METHODS)}")
    parser.add_argument("--capacity", metavar="N,N", help="otherwise 16, its doubles, the prompt")
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="longest answer in tokens"
    )
    parser.add_argument("--truncate", action="store_true", help="cut a long document's middle out")
    parser.add_argument(
        "--output", default="sweep.json", metavar="FILE.json", help=f"summary; {BESIDE}"
    )


def _tasks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--documents",
        required=True,
        metavar="DIR",
        help=".txt files, 5 or more; questions.json beside them: some texts' own questions",
    )
    parser.add_argument(
        "--questions", metavar="FILE", help="JSON, a task's name to its question, for the others"
    )
    _add_methods(parser, "DynamicKV", "128")
    parser.add_argument(
        "--output", default="tasks.json", metavar="FILE.json", help=f"summary; {BESIDE}"
    )


def _turns(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="SCBench's .jsonl files, or .txt files with turns.json or questions.json; otherwise "
        "tables of keys and values, made up",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="first N documents of the data")
    parser.add_argument("--document", metavar="FILE", help="UTF-8 text; with --questions")
    parser.add_argument(
        "--questions",
        metavar="FILE",
        help="a question a line, or JSON: a list of questions or of "
        '{"question": ..., "answers": [...]}; the cache is compressed for the first',
    )
    _add_methods(parser, "FullKV,SnapKV,DynamicKV", "64,128")
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="made-up tables")
    parser.add_argument("--pairs", type=int, default=60, metavar="N", help="keys in each")
    parser.add_argument("--asked", type=int, default=5, metavar="N", help="keys asked for in each")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is made up")
    parser.add_argument(
        "--max-new-tokens", type=int, default=32, metavar="N", help="longest answer in tokens"
    )
    parser.add_argument("--truncate", action="store_true", help="cut a long document's middle out")
    parser.add_argument(
        "--output", default="turns.json", metavar="FILE.json", help=f"summary; {BESIDE}"
    )


def _forgetting(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--document", required=True, metavar="FILE,FILE", help="UTF-8 texts, fed to the end"
    )
    _add_methods(parser, "StreamingLLM,H2O,SnapKV,PyramidKV,DynamicKV", "128,256,512")
    parser.add_argument(
        "--buffer", type=int, default=64, metavar="N", help="tokens held beyond the capacity"
    )
    parser.add_argument(
        "--prompt-tokens", type=int, default=512, metavar="N", help="of each text, read before"
    )
    parser.add_argument(
        "--answer-tokens", type=int, default=1024, metavar="N", help="of each text, fed"
    )
    parser.add_argument(
        "--output", default="forgetting.json", metavar="FILE.json", help=f"summary; {BESIDE}"
    )


def _add_methods(parser: argparse.ArgumentParser, methods: str, capacity: str) -> None:
    parser.add_argument(
        "--methods", default=methods, metavar="A,B", help=f"from {', '.join(METHODS)}"
    )
    parser.add_argument(
        "--capacity", default=capacity, metavar="N,N", help="mean prompt tokens per layer"
    )
    add_settings(parser)


class Help(argparse.HelpFormatter):
    """Says every default that is not said."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = action.default not in (None, argparse.SUPPRESS) and action.default is not False
        return f"{action.help} (default: %(default)s)" if told else action.help
