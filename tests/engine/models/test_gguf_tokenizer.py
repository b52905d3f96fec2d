"""Tokens of GGUF files: those of the tokenizer that the file was made from."""

from __future__ import annotations

import json
import random
from pathlib import Path

import gguf
import numpy as np
import pytest
import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

import dynamickv as dkv
from dynamickv.models.gguf import read
from dynamickv.models.gguf_tokenizer import RULE_OF, load_tokenizer
from dynamickv.reading.prompt import encode_prompt
from tests.engine.models.checkpoints import PIECES, train_sentencepiece
from tests.engine.models.gguf_file import add, write_model
from tests.engine.reading.test_prompt import TEXTS
from tests.engine.tiny import DOCUMENT, QUESTION, tiny_model

LINES = [
    "a\n\n1. item",
    "line\n    42",
    "x:  12",
    "\t7\t 8",
    "in 1947 and 12345678",
    "We'LL see; it's Ms O'Brien's",
    "naïve cafe\u0301 ½ ² Ⅷ",
    "港口 港口\r\n\r\nend  ",
    "HTTPServer camelCase /path/\n/next",
    "🌧️🏴‍☠️ \u0600\u00a0x",
    "a\u200d b\u3000c",
]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    """A BPE with merges across what the rules tell apart: white space, digits, words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # Long pieces, so that merges exist which most rules keep from happening.
            pre_tokenizers.Split(Regex(r".{1,12}|\n+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([DOCUMENT, *(line * 3 for line in LINES), *LINES * 9], trainer)
    return tokenizer


def from_file(path: Path, trained: Tokenizer, pre: str | None, **more: object) -> Path:
    return write_model(path, tiny_model(), "llama", pre=pre, backend=trained, **more)


def original(trained: Tokenizer, *steps: pre_tokenizers.PreTokenizer) -> Tokenizer:
    """The same vocabulary behind another way of splitting."""
    tokenizer = Tokenizer.from_str(trained.to_str())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    return tokenizer


def texts() -> list[str]:
    rng = random.Random(0)
    pieces = [
        *LINES,
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "1",
        "23",
        "456",
        "a",
        "B",
        "'s",
        "é",
        "港",
        ".",
    ]
    mixed = ["".join(rng.choices(pieces, k=rng.randrange(1, 12))) for _ in range(300)]
    return [*LINES, *TEXTS.values(), *mixed]


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
# Meta-Llama-3-8B's and Mistral-Nemo's tokenizer.json.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ORIGINALS = {
    "gpt-2": [GPT2],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), GPT2],
    "starcoder": [pre_tokenizers.Digits(individual_digits=True), GPT2],
    "llama-bpe": [split(LLAMA3), BYTES],
    "dbrx": [split(LLAMA3), BYTES],
    "tekken": [split(TEKKEN), BYTES],
}


@pytest.mark.parametrize("pre", ORIGINALS)
def test_text_is_split_as_by_the_original_tokenizer(
    tmp_path: Path, trained: Tokenizer, pre: str
) -> None:
    tokenizer = load_tokenizer(read(from_file(tmp_path / "a.gguf", trained, pre)))
    expected = original(trained, *ORIGINALS[pre])
    if pre in ("llama-bpe", "tekken"):
        expected.model.ignore_merges = True
    for text in texts():
        got = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        wanted = expected.encode(text, add_special_tokens=False)
        assert got["input_ids"] == wanted.ids
        assert got["offset_mapping"] == wanted.offsets
        assert tokenizer.decode(got["input_ids"]) == text


@pytest.mark.parametrize(("pre", "kind"), [("qwen2", Qwen2Tokenizer), ("qwen35", Qwen3_5Tokenizer)])
def test_qwens_text_is_split_as_by_its_own_tokenizer(
    tmp_path: Path, trained: Tokenizer, pre: str, kind: type[PreTrainedTokenizerBase]
) -> None:
    """Characters are composed first."""
    tokenizer = load_tokenizer(read(from_file(tmp_path / "a.gguf", trained, pre)))
    model = json.loads(trained.to_str())["model"]
    expected = kind(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    for text in texts():
        assert tokenizer(text)["input_ids"] == expected(text)["input_ids"]


def test_the_rules_differ_on_these_texts(tmp_path: Path, trained: Tokenizer) -> None:
    """Else the tests above would show little."""
    model = read(from_file(tmp_path / "a.gguf", trained, "gpt-2"))
    seen = set()
    names = ("gpt-2", "smollm", "llama-bpe", "qwen2", "qwen35", "tekken", "gpt-4o", "deepseek-v3")
    for pre in names:
        model.metadata["tokenizer.ggml.pre"] = pre
        tokenizer = load_tokenizer(model)
        seen.add(str([tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts()]))
    assert len(seen) == len(names)


@pytest.mark.parametrize("pre", sorted(RULE_OF))
def test_every_rule_loses_no_character_and_locates_each(
    tmp_path: Path, trained: Tokenizer, pre: str
) -> None:
    tokenizer = load_tokenizer(read(from_file(tmp_path / "a.gguf", trained, pre)))
    for line in [*LINES, *TEXTS.values()]:
        prompt = encode_prompt(tokenizer, line, QUESTION, limit=4096)
        covered = 0
        for start, end in prompt.offsets:
            assert start <= covered <= end
            covered = end
        assert covered == len(prompt.text)
        if not RULE_OF[pre].composed:
            assert tokenizer.decode(prompt.token_ids) == prompt.text


@pytest.mark.parametrize(("pre", "whole"), [("llama-bpe", True), ("tekken", True), ("dbrx", False)])
def test_a_word_that_is_a_token_stays_whole_where_the_kind_says_so(
    tmp_path: Path, pre: str, whole: bool
) -> None:
    """Its merges would never lead there."""
    vocabulary = {"<a>": 0, "<b>": 1, "<c>": 2, "x": 3, "y": 4, "z": 5, "xy": 6, "xyz": 7}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("x", "y")]))
    path = from_file(tmp_path / "a.gguf", backend, pre)
    ids = load_tokenizer(read(path))("xyz", add_special_tokens=False)["input_ids"]
    assert ids == ([7] if whole else [6, 5])


@pytest.mark.parametrize("pre", ["falcon", "bloom", "made-up"])
def test_an_unknown_way_of_splitting_is_refused(
    tmp_path: Path, trained: Tokenizer, pre: str
) -> None:
    path = from_file(tmp_path / "a.gguf", trained, pre)
    with pytest.raises(ValueError, match=rf"a.gguf splits text in the way '{pre}' \(tokenizer"):
        load_tokenizer(read(path))


@pytest.mark.parametrize("pre", [None, "default"])
def test_a_file_that_does_not_say_how_text_is_split_is_read_with_a_warning(
    tmp_path: Path, trained: Tokenizer, pre: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = load_tokenizer(read(from_file(tmp_path / "a.gguf", trained, pre)))
    assert "a.gguf does not say how its tokenizer splits text" in caplog.text
    for text in LINES:
        assert tokenizer(text)["input_ids"] == original(trained, GPT2).encode(text).ids


@pytest.mark.parametrize(
    ("pre", "said", "first"),
    [
        ("llama-bpe", {}, [0]),
        ("tekken", {}, [0]),
        ("smollm", {}, []),
        ("llama-bpe", {"add_bos_token": False}, []),
        ("smollm", {"add_bos_token": True}, [0]),
    ],
)
def test_a_text_begins_with_bos_where_the_file_or_else_the_kind_says_so(
    tmp_path: Path, trained: Tokenizer, pre: str, said: dict[str, bool], first: list[int]
) -> None:
    tokenizer = load_tokenizer(read(from_file(tmp_path / "a.gguf", trained, pre, **said)))
    plain = tokenizer("light", add_special_tokens=False)["input_ids"]
    assert tokenizer("light")["input_ids"] == [*first, *plain]


def test_markup_and_whole_words_are_never_split_and_keep_their_numbers(
    tmp_path: Path, trained: Tokenizer
) -> None:
    """Also where they are spelled in letters that no byte has."""
    backend = Tokenizer.from_str(trained.to_str())
    size = backend.get_vocab_size()
    content = json.loads(backend.to_str())
    content["model"]["vocab"] |= {"<\uff5cUser\uff5c>": size, "<think>": size + 1, "  ": size + 2}
    content["added_tokens"] = []
    backend = Tokenizer.from_str(json.dumps(content))
    types = {
        "<\uff5cUser\uff5c>": gguf.TokenType.CONTROL,
        "<think>": gguf.TokenType.USER_DEFINED,
        "  ": gguf.TokenType.USER_DEFINED,
    }
    path = write_model(
        tmp_path / "a.gguf", tiny_model(), "llama", pre="gpt-2", backend=backend, types=types
    )
    tokenizer = load_tokenizer(read(path))
    assert len(tokenizer) == size + 3
    ids = tokenizer("<\uff5cUser\uff5c><think>  ")["input_ids"]
    assert ids == [size, size + 1, size + 2]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>  "


@pytest.mark.parametrize("pre", ["smollm", "qwen2", "llama-bpe", "gpt-4o"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_loaded_models_tokenizer_is_the_files(
    tmp_path: Path,
    trained: Tokenizer,
    pre: str,
    family: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """transformers has rules of its own for Qwen, whatever the file says."""
    monkeypatch.setenv("DYNAMICKV_CACHE", str(tmp_path / "cache"))
    model = tiny_model(family, vocab_size=trained.get_vocab_size())
    path = write_model(tmp_path / "a.gguf", model, family, pre=pre, backend=trained)
    loaded, direct = dkv.load_model(path, device="cpu").tokenizer, load_tokenizer(read(path))
    assert loaded.backend_tokenizer.to_str() == direct.backend_tokenizer.to_str()
    assert loaded.special_tokens_map == direct.special_tokens_map
    assert loaded.chat_template == direct.chat_template


# SentencePiece.


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another tokenizer"])
def test_sentencepieces_tokens_are_its_own(tmp_path: Path, prefix: bool, beside: bool) -> None:
    folder = tmp_path / "trained"
    folder.mkdir()
    pieces = train_sentencepiece(folder, prefix)
    path = write_sentencepiece(tmp_path / "a.gguf", pieces, prefix)
    if beside:
        (tmp_path / "other").mkdir()
        other = train_sentencepiece(tmp_path / "other", not prefix)
        other.rename(tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(read(path))
    expected = sentencepiece.SentencePieceProcessor(str(pieces))
    for text in ["Who keeps the light?", " Who", "The  pier\n\nwas", "é🌧️ x", *LINES]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == expected.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer(text)["input_ids"] == [1, *ids]
    # After markup a text begins anew, as llama.cpp has it.
    assert tokenizer("<s>Who", add_special_tokens=False)["input_ids"] == [
        1,
        *expected.encode("Who"),
    ]


@pytest.mark.parametrize(
    ("said", "before", "after"),
    [
        ({}, [1], []),
        ({"add_bos_token": False}, [], []),
        ({"add_bos_token": True, "add_eos_token": True}, [1], [2]),
    ],
    ids=["unsaid", "without", "both"],
)
def test_bos_and_eos_stand_around_sentencepieces_as_the_file_says(
    tmp_path: Path, said: dict[str, bool], before: list[int], after: list[int]
) -> None:
    pieces = train_sentencepiece(tmp_path, True)
    tokenizer = load_tokenizer(read(write_sentencepiece(tmp_path / "a.gguf", pieces, True, **said)))
    plain = tokenizer("The pier", add_special_tokens=False)["input_ids"]
    assert tokenizer("The pier")["input_ids"] == [*before, *plain, *after]
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert tokenizer.special_tokens_map == names


def write_sentencepiece(path: Path, pieces: Path, prefix: bool, **said: bool) -> Path:
    """A file with a vocabulary and hardly a model."""
    proto = ModelProto.FromString(pieces.read_bytes())
    writer = gguf.GGUFWriter(path, "llama")
    add(writer, "llama.vocab_size", PIECES)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece.piece for piece in proto.pieces])
    writer.add_token_scores([piece.score for piece in proto.pieces])
    writer.add_token_types([piece.type for piece in proto.pieces])
    for name, token in (("bos", 1), ("eos", 2), ("unknown", 0)):
        add(writer, f"tokenizer.ggml.{name}_token_id", token)
    for key, value in said.items():
        add(writer, f"tokenizer.ggml.{key}", value)
    writer.add_add_space_prefix(prefix)
    writer.add_tensor("token_embd.weight", np.ones((PIECES, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
