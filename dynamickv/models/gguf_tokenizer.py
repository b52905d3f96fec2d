"""The tokenizer of a GGUF file, split as the file says that its vocabulary was learned.

Byte-level BPE is built here: transformers knows few names of `tokenizer.ggml.pre`, reads the others
as GPT-2's without a word, and takes minutes for a large vocabulary. Other kinds are transformers',
but for the space that SentencePiece puts before a text.
The names and their rules are llama.cpp's (src/llama-vocab.cpp); where its pattern only approximates
the original tokenizer's, the original's stands here.
"""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dynamickv.models.faults import UnusableModelError
from dynamickv.models.gguf import Gguf, write_header

log = logging.getLogger(__name__)

CONTROL, USER_DEFINED = 3, 4
"""Token types: markup, and other text that is never split."""
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How text is taken apart before merging."""

    splits: tuple[str, ...] = ()
    """Patterns, one after the other, each within the pieces of those before it."""
    gpt2: bool = False
    """Whether GPT-2's own pattern follows."""
    whole_tokens: bool = False
    """Whether a piece that is a token stays one, whatever the merges say."""
    bos: bool = False
    """Whether BOS begins a text where the file does not say."""
    composed: bool = False
    """Whether characters are composed first (NFC)."""


def _words(letters: str, digits: str, others: str) -> str:
    return (
        rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?{letters}+|{digits}"
        rf"| ?[^\s{others}]+[\r\n]*|{BLANKS}"
    )


def _cased_words(ending: str, digits: str) -> str:
    before = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{before}{UPPER}*{LOWER}+{ending}|{before}{UPPER}+{LOWER}*{ending}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{BLANKS}"
    )


LETTERS_AND_DIGITS = r"\p{L}\p{N}"
LLAMA3 = (_words(r"\p{L}", r"\p{N}{1,3}", LETTERS_AND_DIGITS),)
QWEN2 = (_words(r"\p{L}", r"\p{N}", LETTERS_AND_DIGITS),)
QWEN35 = (_words(r"[\p{L}\p{M}]", r"\p{N}", r"\p{L}\p{M}\p{N}"),)
TEKKEN = (_cased_words("", r"\p{N}"),)
GPT4O = (_cased_words(rf"{CONTRACTIONS}?", r"\p{N}{1,3}"),)
DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{BLANKS}",
)

RULES = {
    Rule(gpt2=True): "gpt-2 phi-2 mpt olmo jais exaone4 trillion granite-docling",
    Rule(splits=(r"\p{N}",), gpt2=True): "smollm starcoder refact command-r codeshell minerva-7b",
    Rule(splits=LLAMA3, whole_tokens=True, bos=True): "llama3 llama-v3 llama-bpe falcon3 falcon-h1"
    " pixtral midm-2.0 lfm2",
    Rule(splits=LLAMA3): "dbrx smaug-bpe glm4 chatglm-bpe",
    Rule(splits=QWEN2, composed=True): "qwen2",
    Rule(splits=QWEN2): "deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2",
    Rule(splits=QWEN35, composed=True): "qwen35",
    Rule(splits=TEKKEN, whole_tokens=True, bos=True): "tekken",
    Rule(splits=GPT4O): "gpt-4o llama4 kanana2 talkie minimax-m2",
    Rule(splits=DEEPSEEK3): "deepseek-v3",
}
RULE_OF = {name: rule for rule, names in RULES.items() for name in names.split()}
"""`tokenizer.ggml.pre` -> how text is split."""
UNNAMED = ("", "default")
"""What files from before the key, or from converters that did not know the tokenizer, say."""


def load_tokenizer(model: Gguf) -> PreTrainedTokenizerBase:
    """The file's tokenizer, with its chat template.

    Raises:
        ValueError: if the file names a way of splitting text that is not known here.
    """
    kind = model.metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        return _byte_level(model)
    with tempfile.TemporaryDirectory(prefix="dynamickv-") as folder:
        # Alone in a folder: transformers would rather take a tokenizer.json that lies beside it.
        write_header(model, Path(folder) / "header.gguf")
        # By its class: AutoTokenizer reads the configuration too, which takes a minute.
        ready: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(
            folder, gguf_file="header.gguf"
        )
    _mark_ends(ready, model)
    if kind == "llama" and not model.architecture.startswith("gemma"):
        _as_sentencepiece(
            ready.backend_tokenizer, model.metadata.get("tokenizer.ggml.add_space_prefix", True)
        )
    return ready


def _mark_ends(tokenizer: PreTrainedTokenizerFast, model: Gguf) -> None:
    """Name the markup that the file names, and put BOS and EOS around a text as llama.cpp does.

    transformers 5.17 takes BOS for EOS, and leaves BOS out before 5.23.
    """
    said: dict[str, Any] = dict(_named(model))
    kind = model.metadata.get("tokenizer.ggml.model")
    if kind in ("llama", "gemma4"):
        bos = model.metadata.get("tokenizer.ggml.add_bos_token", True)
        # gemma4's chat template writes BOS itself, whatever the file says.
        said["add_bos_token"] = bool(bos and kind == "llama")
        said["add_eos_token"] = bool(model.metadata.get("tokenizer.ggml.add_eos_token", False))
    for name, value in said.items():
        setattr(tokenizer, name, value)


def _named(model: Gguf) -> dict[str, str | None]:
    """Markup by transformers' name for it, such as "bos_token"; None where the file has none."""
    tokens = model.metadata["tokenizer.ggml.tokens"]
    theirs = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {
        f"{ours}_token": model.metadata.get(f"tokenizer.ggml.{name}_token_id")
        for ours, name in theirs.items()
    }
    return {name: None if token is None else tokens[token] for name, token in ids.items()}


def _as_sentencepiece(tokenizer: Tokenizer, prefix: bool) -> None:
    """Mark spaces and the start of a text, also after markup, as SentencePiece and llama.cpp do."""
    tokenizer.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend("▁")] if prefix else []), normalizers.Replace(" ", "▁")]
    )
    tokenizer.pre_tokenizer = None
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefix else []),
        ]
    )


def _byte_level(model: Gguf) -> PreTrainedTokenizerFast:
    settings = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in model.metadata.items()
        if key.startswith("tokenizer.ggml.")
    }
    rule = _rule(model.name, str(settings.get("pre", "")))
    tokens: list[str] = settings["tokens"]
    tokenizer = Tokenizer(
        BPE(
            {token: index for index, token in enumerate(tokens)},
            [_halves(merge) for merge in settings.get("merges", ())],
            fuse_unk=False,
            ignore_merges=rule.whole_tokens,
        )
    )
    if rule.composed:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(split), behavior="isolated") for split in rule.splits),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule.gpt2),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = dict(zip(tokens, settings.get("token_type", ()), strict=False))
    tokenizer.add_special_tokens(_added(kinds, CONTROL))
    tokenizer.add_tokens(_added(kinds, USER_DEFINED))
    names = _named(model)
    tokenizer.post_processor = _around(
        tokenizer,
        names["bos_token"] if settings.get("add_bos_token", rule.bos) else None,
        names["eos_token"] if settings.get("add_eos_token", False) else None,
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        chat_template=model.metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **names,
    )


def _rule(name: str, pre: str) -> Rule:
    if pre in UNNAMED:
        log.warning(
            "%s does not say how its tokenizer splits text (tokenizer.ggml.pre is %r); GPT-2's "
            "way is used, so digits and white space may give other tokens than the model learned.",
            name,
            pre or "absent",
        )
        return Rule(gpt2=True)
    if pre not in RULE_OF:
        raise UnusableModelError(
            f"{name} splits text in the way {pre!r} (tokenizer.ggml.pre), which is not known here; "
            "load the model's folder with safetensors instead"
        )
    return RULE_OF[pre]


def _halves(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _added(kinds: dict[str, int], kind: int) -> list[AddedToken]:
    return [
        AddedToken(token, normalized=False, special=kind == CONTROL)
        for token, its in kinds.items()
        if its == kind
    ]


def _around(tokenizer: Tokenizer, before: str | None, after: str | None) -> TemplateProcessing:
    return TemplateProcessing(
        single=[part for part in (before, "$A", after) if part],
        special_tokens=[
            (token, tokenizer.token_to_id(token)) for token in (before, after) if token
        ],
    )
