#!/usr/bin/env bash
# AutoTokenizer makes a tokenizer for a folder that has none, and it turns every text into nothing.
#
# Versions: transformers 5.24.0, tokenizers 0.23.3.
# Seen: folders with a config.json alone, which is what a model's save_pretrained leaves beside its
#   weights. AutoTokenizer.from_pretrained(folder) answers, without a warning or a word in the log:
#     qwen3   Qwen2Tokenizer, 1 token in all;  "The capital of France" and "Hello" are both []
#     gpt2    GPT2Tokenizer, 1 token in all;   both []
#     bert    BertTokenizer, 5 tokens in all;  every word is [UNK]: [2, 1, 1, 1, 1, 3] and [2, 1, 3]
#     llama   ValueError: Couldn't instantiate the backend tokenizer
# Why a good guess is wrong: from_pretrained loads, and what is not there cannot be loaded: for a folder
#   without weights the model's raises, and so does this one for a Llama. Classes with a default for
#   their vocabulary are built from that default instead. Whoever saved a model and forgot its tokenizer
#   looks for the fault in the weights: two sentences of the same number of words are one to this BERT,
#   and to the other two every prompt is the empty one.
# Fails if the first three raise, say something or know a word, or the fourth does not raise.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
python=$folder/env/bin/python
"$python" -m pip install --quiet --disable-pip-version-check transformers==5.24.0 tokenizers==0.23.3

cat > "$folder/load.py" <<'END'
import logging
import sys
import warnings
from pathlib import Path

from transformers import AutoTokenizer, BertConfig, GPT2Config, LlamaConfig, Qwen3Config

TEXTS = ("The capital of France", "Hello")
said = []


class Kept(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())


def load(config) -> str:
    folder = Path(sys.argv[1], config.model_type)
    config.save_pretrained(folder)
    said.clear()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except ValueError as error:
            return f"ValueError: {' '.join(str(error).split()[:5])}"
        ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    return f"{type(tokenizer).__name__} {len(tokenizer)} {ids} said {len(warned) + len(said)}"


logging.getLogger("transformers").addHandler(Kept(logging.WARNING))
for config in (Qwen3Config(), GPT2Config(), BertConfig(), LlamaConfig()):
    print(f"{config.model_type}: {load(config)}")
END

seen=$("$python" "$folder/load.py" "$folder/models" 2>"$folder/errors") || { tail -n 20 "$folder/errors" >&2; exit 1; }
echo "$seen"
[ "$seen" = "qwen3: Qwen2Tokenizer 1 [[], []] said 0
gpt2: GPT2Tokenizer 1 [[], []] said 0
bert: BertTokenizer 5 [[2, 1, 1, 1, 1, 3], [2, 1, 3]] said 0
llama: ValueError: Couldn't instantiate the backend tokenizer" ] || {
    echo "expected three tokenizers without words and an error for llama: the finding has changed" >&2
    exit 1
}
