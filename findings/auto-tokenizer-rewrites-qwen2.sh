#!/usr/bin/env bash
# AutoTokenizer gives a saved tokenizer another normaliser and another splitting rule when the folder's
# model is a Qwen2.
#
# Versions: transformers 5.24.0, tokenizers 0.23.3.
# Seen: a byte-level tokenizer with the one merge "12" and no normaliser, saved, beside a config.json of
#   model_type qwen2. PreTrainedTokenizerFast.from_pretrained reads back what was saved: 1 token for
#   "12", 3 for an e and its accent written apart. AutoTokenizer: 2 and 2. The saved
#   tokenizer_config.json names the class TokenizersBackend; AutoTokenizer answers with Qwen2Tokenizer.
# Why a good guess is wrong: tokenizer.json holds the whole pipeline, and is taken for the whole truth;
#   but Qwen2Tokenizer keeps only its vocabulary and merges and builds NFC and its own pattern (digits
#   one by one) around them. A model of another family's vocabulary in Qwen2's architecture (many
#   conversions and fine-tunes are) is fed tokens it was not trained with, and nothing is said.
# Fails if AutoTokenizer reads the folder as it was saved.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
python=$folder/env/bin/python
"$python" -m pip install --quiet --disable-pip-version-check transformers==5.24.0 tokenizers==0.23.3

cat > "$folder/reload.py" <<'END'
import json
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

# A byte-level BPE with one merge, "1" + "2"; no normaliser.
vocab = {letter: place for place, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
vocab["12"] = len(vocab)
inner = Tokenizer(models.BPE(vocab=vocab, merges=[("1", "2")]))
inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
inner.decoder = decoders.ByteLevel()
with tempfile.TemporaryDirectory() as folder:
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(folder)
    Path(folder, "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    saved = PreTrainedTokenizerFast.from_pretrained(folder)
    auto = AutoTokenizer.from_pretrained(folder)
    for text in ("12", "e\u0301"):
        print(len(saved(text)["input_ids"]), len(auto(text)["input_ids"]), end=" ")
    print(type(auto).__name__)
END

seen=$("$python" "$folder/reload.py" 2>/dev/null | tail -n 1)
echo "tokens of 12, saved and auto; of e with accent, saved and auto; class: $seen"
[ "$seen" = "1 2 3 2 Qwen2Tokenizer" ] || { echo "expected 1 2 3 2 Qwen2Tokenizer: the finding has changed" >&2; exit 1; }
