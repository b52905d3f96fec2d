#!/usr/bin/env bash
# transformers' BLT model cannot run with the cache that it makes for itself by default.
#
# Versions: transformers 5.24.0, torch 2.13.0.
# Seen: BltForCausalLM of a tiny BltConfig, called on token ids as every causal model is, ends in
#   AttributeError: 'BltConfig' object has no attribute 'num_hidden_layers'. With use_cache=False the
#   same call gives logits.
# Why a good guess is wrong: DynamicCache(config=...) is how models of this version make their
#   cache, and it reads the layers off config.get_text_config(), which for a text model is the config
#   itself. BLT is four transformers in one (patcher, local encoder, global, local decoder), and only
#   their sub-configs have layers; the mapping of causal language models lists it like any other, and
#   generate, which needs the cache, cannot be called at all.
# Fails if the call with a cache works, or the one without does not.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
python=$folder/env/bin/python
"$python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 numpy==2.4.6

cat > "$folder/call.py" <<'END'
import torch
from transformers import BltConfig, BltForCausalLM

small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
config = BltConfig(
    vocab_size=260,
    encoder_hash_byte_group_vocab=100,
    patcher_config={**small, "vocab_size": 260},
    encoder_config={**small, "vocab_size": 260, "cross_attn_k": 2},
    decoder_config={**small, "vocab_size": 260, "cross_attn_k": 2, "hidden_size_global": 64},
    global_config={**small, "hidden_size": 64},
)
torch.manual_seed(0)
model = BltForCausalLM(config).eval()
ids = torch.randint(5, 250, (1, 12))
with torch.no_grad():
    print(tuple(model(ids, use_cache=False).logits.shape[:2]))
    try:
        model(ids)
        print("no error")
    except AttributeError as error:
        print(error)
END

seen=$("$python" "$folder/call.py" 2>/dev/null)
echo "$seen"
[ "$seen" = "(1, 12)
'BltConfig' object has no attribute 'num_hidden_layers'" ] || { echo "expected logits without a cache and an AttributeError with one: the finding has changed" >&2; exit 1; }
