#!/usr/bin/env bash
# generate reads the whole prompt a second time when its cache holds exactly that prompt.
#
# Versions: transformers 5.24.0, torch 2.13.0.
# Seen: a cache that has read all n tokens of a prompt, given to generate with the same prompt. The
#   model is fed n tokens again behind the n it holds; afterwards the cache has 2 n + 1 entries and
#   the answer differs from the one without a cache. With n - 1 tokens held, one is fed and the
#   answer is right.
# Why a good guess is wrong: "feed what the cache lacks" leaves 0 tokens here, and the slice that
#   takes the last 0 of them, [:, -0:], takes all. An empty slice would be an error; nothing is
#   said. It meets whoever reads a document once and then asks generate for a continuation of it.
# Fails if that is refused, or answered as without a cache.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
python=$folder/env/bin/python
"$python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0

cat > "$folder/twice.py" <<'END'
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.5,
    )
).eval()
prompt = torch.randint(0, 97, (1, 20))
settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def answered(held: int) -> tuple[list[int], int]:
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        if held:
            model(prompt[:, :held], cache=cache)
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), cache=cache, **settings)
    return output[0, 20:].tolist(), cache.get_seq_length()


(plain, length), (one_less, _), (all_held, longer) = answered(0), answered(19), answered(20)
print(one_less == plain, all_held == plain, length, longer)
END

seen=$("$python" "$folder/twice.py" 2>/dev/null | tail -n 1)
echo "same answer with 19 of 20 held, with 20 of 20; entries without and with: $seen"
[ "$seen" = "True False 25 45" ] || { echo "expected True False 25 45: the finding has changed" >&2; exit 1; }
