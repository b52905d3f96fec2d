#!/usr/bin/env bash
# Gemma 2 computes without the cap on its attention logits, unless eager attention is asked for.
#
# Versions: transformers 5.20.2, torch 2.13.0. (5.21.1 chooses eager by itself.)
# Seen: two models of one seed and config, attn_logit_softcapping 2; one as the library loads it, one
#   with attn_implementation="eager". The default is sdpa, and its logits differ from eager's by more
#   than 0.1.
# Why a good guess is wrong: the cap is in the config, the model class says that it supports sdpa, and
#   the layer hands softcap to whatever attention it calls; sdpa's function takes any keyword and does
#   not use this one. The same call with an unknown argument to torch itself would be an error.
# Fails if the default of that version caps.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
python=$folder/env/bin/python
"$python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.20.2

cat > "$folder/cap.py" <<'END'
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

SIZES = dict(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, attn_logit_softcapping=2.0, initializer_range=0.5,
)


def logits(**how) -> tuple[str, torch.Tensor]:
    torch.manual_seed(0)
    model = Gemma2ForCausalLM._from_config(Gemma2Config(**SIZES), **how).eval()
    with torch.inference_mode():
        return model.config._attn_implementation, model(torch.arange(1, 25)[None]).logits


(name, default), (_, eager) = logits(), logits(attn_implementation="eager")
print(name, bool((default - eager).abs().max() > 0.1))
END

seen=$("$python" "$folder/cap.py" 2>/dev/null | tail -n 1)
echo "default attention, its logits differ from eager's: $seen"
[ "$seen" = "sdpa True" ] || { echo "expected sdpa True: the finding has changed" >&2; exit 1; }
