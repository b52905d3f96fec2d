#!/usr/bin/env bash
# kvpress scores Gemma 3 27B's keys by attention at another scale than the model's own.
#
# Versions: kvpress 0.5.5, transformers 5.2.0, torch 2.13.0.
# Seen: a tiny Gemma 3 of one layer, head_dim 128. With query_pre_attn_scalar 128 the attention that
#   SnapKVPress computes for its window is the model's own to 4 digits; with 168, which is what the
#   27B model has (its head_dim is 128 too), it is off by more than 0.01 in places. No warning.
# Why a good guess is wrong: Gemma3ForConditionalGeneration is on kvpress's list of supported models,
#   the press gets the attention module, and that module carries its scaling; the press divides by
#   the root of head_dim instead. The smaller Gemma 3 models have a scalar equal to their head_dim, so
#   that whoever tries one of them sees nothing.
# Fails if both agree, or if the list no longer has the model.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
python=$folder/env/bin/python
"$python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.2.0 kvpress==0.5.5

cat > "$folder/scale.py" <<'END'
import torch
from kvpress import SnapKVPress
from kvpress.presses.base_press import SUPPORTED_MODELS
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

WINDOW, LENGTH = 8, 32


class Watched(SnapKVPress):
    """Keeps the attention that it scores with."""

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        places = kwargs["position_embeddings"]
        self.used = self.compute_window_attention(module, hidden_states, keys, WINDOW, places)
        return super().score(module, hidden_states, keys, values, attentions, kwargs)


def farthest(scalar: int) -> float:
    torch.manual_seed(0)
    text = dict(
        vocab_size=120, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=128, query_pre_attn_scalar=scalar, layer_types=["full_attention"],
        initializer_range=0.1,
    )
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    ids = torch.arange(3, LENGTH + 3)[None]
    press = Watched(compression_ratio=0.5, window_size=WINDOW, kernel_size=1)
    with torch.inference_mode():
        applied = model(ids, output_attentions=True).attentions[0][:, :, -WINDOW:, :-WINDOW]
        with press(model):
            model(ids)
    return (press.used - applied).abs().max().item()


listed = Gemma3ForConditionalGeneration in SUPPORTED_MODELS
print(listed, farthest(128) < 1e-4, farthest(168) > 1e-2)
END

seen=$("$python" "$folder/scale.py" 2>/dev/null | tail -n 1)
echo "listed as supported, the same at scalar 128, off at scalar 168: $seen"
[ "$seen" = "True True True" ] || { echo "expected True True True: the finding has changed" >&2; exit 1; }
