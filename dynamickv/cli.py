"""The command line: progress on stderr, results on stdout, exit code 2 and one sentence on bad
input."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from dynamickv.compare import compare_stream
from dynamickv.evaluate.arguments import (
    add_settings,
    listed,
    output_file,
    settings_of,
    with_options,
)
from dynamickv.evaluate.options import Help, add_commands
from dynamickv.memory import bytes_per_value, free_memory
from dynamickv.methods import METHODS, CompressionMethod, build_methods
from dynamickv.methods.decoding import Decoding, require_decodable
from dynamickv.models import (
    DEFAULT_MODEL,
    KNOWN_MODELS,
    QUANTIZATIONS,
    LoadedModel,
    cache_folder,
    embedded_file,
    kept_conversions,
    load_model,
)
from dynamickv.models.catalogue import KnownModel
from dynamickv.models.precision import PRECISIONS, require_precision
from dynamickv.reading.prompt import require_longer_document, require_text
from dynamickv.record.aligned import Aligned
from dynamickv.record.events import ComparisonFinished, Progress, Token
from dynamickv.record.expected import require_expected
from dynamickv.record.trace import Run, Trace, seconds_per_token
from dynamickv.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the process's exit code."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], None] = options.command
    said = logging.StreamHandler(sys.stderr)
    log = logging.getLogger("dynamickv")
    log.addHandler(said)
    log.setLevel(logging.INFO)
    # It warns of every product with 8bit weights that it rounds the input: thousands of lines.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        command(options)
    except (ValueError, OSError, MemoryError) as error:
        print(f"error: {with_options(_sentence(error), options)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    finally:
        log.removeHandler(said)
    return 0


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; {self.prog} --help shows what there is\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m dynamickv", description="KV-cache compression, compared on your own text."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    compare = commands.add_parser(
        "compare",
        help="answer one question with several methods",
        description="Read a document and a question once, compress the cache with each method, and "
        "show every answer with what was kept.",
        formatter_class=Help,
    )
    compare.set_defaults(command=_compare)
    compare.add_argument(
        "--document", required=True, metavar="FILE", help="UTF-8 text; - reads stdin"
    )
    compare.add_argument("--question", required=True, metavar="TEXT", help="about the document")
    compare.add_argument("--model", default=DEFAULT_MODEL, metavar="NAME", help=_MODEL_HELP)
    compare.add_argument(
        "--methods", default="FullKV,DynamicKV", metavar="A,B", help=f"from {', '.join(METHODS)}"
    )
    compare.add_argument(
        "--capacity", type=int, default=128, metavar="N", help="mean prompt tokens per layer"
    )
    compare.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="longest answer in tokens"
    )
    add_settings(compare)
    compare.add_argument(
        "--decode-budget",
        type=int,
        metavar="N",
        help="go on compressing while answering, down to N tokens per layer",
    )
    compare.add_argument(
        "--decode-buffer",
        type=int,
        metavar="N",
        help=f"tokens held beyond it between two choices (default: {Decoding().buffer})",
    )
    compare.add_argument(
        "--truncate", action="store_true", help="cut the middle out of a long document"
    )
    compare.add_argument(
        "--quantization", metavar="|".join(QUANTIZATIONS), help="pack the weights (bitsandbytes)"
    )
    compare.add_argument(
        "--precision",
        default="auto",
        metavar="|".join(PRECISIONS),
        help="of products on a CPU: fast rounds a prompt's as bfloat16",
    )
    compare.add_argument(
        "--expected", default="", metavar="TEXT", help="looked for in the document and the answers"
    )
    compare.add_argument("--output", metavar="FILE", help="the run record, .json or .json.gz")
    add_commands(commands, _read_text)
    models = commands.add_parser("models", help="list what can be loaded here, or prepare one")
    models.set_defaults(command=_models)
    models.add_argument(
        "--prepare", metavar="NAME", help="load it once, so that later starts are fast"
    )
    return parser


_MODEL_HELP = "short name, hub id, folder or .gguf file"


def _compare(options: argparse.Namespace) -> None:
    methods = build_methods(
        listed(options.methods),
        capacity=options.capacity,
        **settings_of(options),
    )
    if any(method.capabilities.layer_budgets for method in methods):
        print(
            "Manual without budgets keeps the capacity in every layer, as SnapKV does; "
            "give budgets in Python: dkv.Manual(budgets=[...])",
            file=sys.stderr,
        )
    decoding = _decoding(options)
    for method in methods:
        if method.capabilities.capacity:
            require_decodable(decoding, method)
    document = _read_text(options.document)
    require_text("document", document)
    require_text("question", options.question)
    require_longer_document(document, options.question)
    if options.output is not None:
        _record_file(options.output)
    require_expected(options.expected)
    require_precision(options.precision)
    llm = load_model(options.model, quantization=options.quantization, precision=options.precision)
    with ExitStack() as bars:
        trace = _followed(llm, document, methods, decoding, options, bars)
    print(report(trace))
    if options.output is not None:
        trace.save(options.output)
        print(f"Record saved to {options.output}", file=sys.stderr)


def _record_file(name: str) -> None:
    """Refuse before the work what cannot be written, or would not be opened by its name."""
    if not output_file(name).name.endswith((".json", ".json.gz")):
        raise ValueError(f"--output {name} must end in .json or .json.gz; rename it")


def _decoding(options: argparse.Namespace) -> Decoding | None:
    """What was asked of the time of the answer."""
    budget, buffer = options.decode_budget, options.decode_buffer
    if budget is None:
        if buffer is not None:
            raise ValueError("--decode-buffer needs a budget; give --decode-budget too")
        return None
    return Decoding(budget=budget) if buffer is None else Decoding(budget=budget, buffer=buffer)


def _followed(
    llm: LoadedModel,
    document: str,
    methods: list[CompressionMethod],
    decoding: Decoding | None,
    options: argparse.Namespace,
    bars: ExitStack,
) -> Trace:
    """Run the comparison, showing its progress on stderr."""
    layers = bars.enter_context(
        tqdm(total=len(llm.geometry.compressed_layers), desc="prefill", unit="layer")
    )
    tokens: tqdm[NoReturn] | None = None
    for event in compare_stream(
        llm,
        document,
        options.question,
        methods=methods,
        max_new_tokens=options.max_new_tokens,
        truncate=options.truncate,
        expected=options.expected,
        decoding=decoding,
    ):
        if isinstance(event, Progress):
            layers.update(event.completed - layers.n)
        elif isinstance(event, Token):
            if tokens is None:
                layers.close()
                tokens = bars.enter_context(tqdm(desc="decode", unit="token"))
            tokens.update()
        elif isinstance(event, ComparisonFinished):
            return event.trace
    raise RuntimeError("the comparison ended without a record")


def report(trace: Trace) -> str:
    """Answers and a small table, as text."""
    prompt, model = trace.prompt, trace.model
    lines = [
        f"{model.name} ({model.dtype} on {model.device}, {model.precision}, {model.attention}), "
        f"prompt {prompt.length:,} tokens, prefill {trace.prefill_seconds:.2f} s"
    ]
    if prompt.truncated:
        lines.append(
            f"TRUNCATED: the middle of the document was cut out "
            f"({prompt.original_length:,} tokens before)."
        )
    for run in trace.runs:
        if "capacity" in run.parameters and run.kept_fraction == 1:
            lines.append(
                f"NOTHING TO COMPRESS: {run.method} may keep {run.parameters['capacity']:,} tokens "
                f"per layer and the prompt has {prompt.length:,}."
            )
    sought = trace.expected
    if sought is not None:
        where = "in the document" if sought.document_utf16_span else "NOT in the document"
        lines.append(f"Expected {sought.text!r}: {where}.")
    heads = ("method", "kept", "KV MiB", "ms/token", "first difference", "survives", "lost word")
    lines += ["", _row(*heads)]
    lines += [_row(*_figures(run, trace)) for run in trace.runs]
    if all(run.method != "FullKV" for run in trace.runs):
        lines.append("-: there is no FullKV run to compare with; add FullKV to --methods.")
    for run in trace.runs:
        found = {True: " (holds what is expected)", False: " (misses what is expected)", None: ""}
        lines += ["", f"{run.method}{found[run.expected_found]}:", run.answer.strip()]
        if run.decoding is not None:
            times = len(run.forgotten)
            lines.append(
                f"(chose again {times} time{'' if times == 1 else 's'} while answering, down to "
                f"{run.decoding['budget']:,} tokens per layer)"
            )
    return "\n".join(lines)


def _figures(run: Run, trace: Trace) -> tuple[str, ...]:
    difference, survives, word = "-", "-", "-"
    if run.agreement is not None:
        first = run.agreement.first_divergence
        difference = "none" if first is None else f"token {first + 1}"
    if run.aligned is not None:
        survives, word = f"{run.aligned.surviving:.1%}", "none"
        if run.aligned.loss is not None:
            word = lost_words(run.aligned, trace.run("FullKV"))
    return (
        run.method,
        f"{run.kept_fraction:.1%}",
        f"{run.kv_bytes / 2**20:.2f}",
        f"{1000 * (seconds_per_token(run.decode_seconds) or 0):.1f}",
        difference,
        survives,
        word,
    )


def lost_words(aligned: Aligned, full: Run) -> str:
    """The word that carries the loss, with its probability under both caches."""
    place = aligned.loss or 0
    before, after = aligned.probabilities_full[place], aligned.probabilities[place]
    first, last = aligned.token_spans[place]
    word = "".join(full.pieces[first:last]).strip()
    return f"{word} {_percent(before)} -> {_percent(after)}"


def _percent(share: float) -> str:
    """A probability; below 1 % with one digit, so that a half tells."""
    return f"{share:.0%}" if share >= 0.01 else f"{100 * share:.1g}%"


def _row(*cells: str) -> str:
    widths = (8, 10, 10, 18, 10)
    numbers = "".join(f"{cell:>{width}}" for cell, width in zip(cells[1:-1], widths, strict=True))
    return f"{cells[0]:<14}{numbers}  {cells[-1]}"


def _models(options: argparse.Namespace) -> None:
    if options.prepare is not None:
        llm = load_model(options.prepare)
        print(f"{llm.name} is ready ({llm.revision}, {llm.dtype} on {llm.device}).")
        return
    for known in KNOWN_MODELS.values():
        file = embedded_file(known)
        size = f"embedded, {file.stat().st_size / 2**20:.0f} MiB" if file else ""
        state = size or f"from the hub: {known.hub_id}"
        print(f"{known.name}  {state}  {known.licence}  {known.description}; {_fits(known)}")
    print("\nAlso: organisation/model on the hub, a folder with safetensors, or a .gguf file.")
    print(f"Converted models are kept in {cache_folder() / 'models'}:")
    for folder, held in kept_conversions():
        print(f"  {folder.name}  {held / 2**20:.0f} MiB")


def _fits(known: KnownModel) -> str:
    """What a model needs here, and whether that much is free."""
    device, free = free_memory()
    needed = known.bytes_needed(bytes_per_value(device))
    verdict = "fits here" if needed <= free else "does not fit here"
    return f"needs {needed / 2**30:.1f} GiB, {verdict}"


def _read_text(name: str) -> str:
    """A UTF-8 text file, or stdin for "-"."""
    path = Path(name)
    if name != "-" and not path.is_file():
        raise ValueError(f"there is no file {name}; give the path of a text file")
    content = sys.stdin.buffer.read() if name == "-" else path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{name} is not UTF-8 text; save it as plain text first") from None
    if "\x00" in text:
        raise ValueError(f"{name} is a binary file; save it as plain text first")
    return text


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file'}: {error.strerror.lower()}"
    return str(error)
