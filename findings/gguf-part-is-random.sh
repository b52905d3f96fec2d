#!/usr/bin/env bash
# transformers loads one part of a GGUF in parts and draws the rest of the model at random.
#
# Versions: transformers 5.24.0, gguf 0.19.0, torch 2.13.0.
# Seen: a tiny Llama written in 3 parts by gguf's own writer (split.count = 3 in each). Loading
#   "tiny-00001-of-00003.gguf" returns a model; two loads of that one file differ in their weights
#   in every layer that lies in the other parts. The parts together are never asked for.
# Why a good guess is wrong: llama.cpp, given the first part, reads all of them, and the file itself
#   says how many there are; sharded safetensors that lack a shard are an error in the same
#   from_pretrained. Here the lost tensors are at most a line of a loading report, and the model
#   answers, with noise.
# Fails if such a load is refused, or reads all parts.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
python=$folder/env/bin/python
"$python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0 numpy==2.4.6

cat > "$folder/load.py" <<'END'
import sys

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, GgufConfig

folder = sys.argv[1]
hidden, heads, kv_heads, layers, forward, words = 32, 4, 2, 6, 48, 64
writer = gguf.GGUFWriter(f"{folder}/tiny.gguf", "llama", split_max_tensors=20)
writer.add_block_count(layers)
writer.add_context_length(128)
writer.add_embedding_length(hidden)
writer.add_feed_forward_length(forward)
writer.add_head_count(heads)
writer.add_head_count_kv(kv_heads)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_rope_dimension_count(hidden // heads)
writer.add_vocab_size(words)
small = kv_heads * hidden // heads
shapes = {"token_embd": (words, hidden), "output": (words, hidden), "output_norm": (hidden,)}
for layer in range(layers):
    for name, shape in {
        "attn_norm": (hidden,), "ffn_norm": (hidden,), "attn_q": (hidden, hidden),
        "attn_k": (small, hidden), "attn_v": (small, hidden), "attn_output": (hidden, hidden),
        "ffn_gate": (forward, hidden), "ffn_up": (forward, hidden), "ffn_down": (hidden, forward),
    }.items():
        shapes[f"blk.{layer}.{name}"] = shape
rng = np.random.default_rng(0)
for name, shape in shapes.items():
    writer.add_tensor(f"{name}.weight", rng.normal(0, 0.1, shape).astype(np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()


def loaded() -> list[torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file="tiny-00001-of-00003.gguf",
        quantization_config=GgufConfig(dequantize=True),
    )
    return [layer.mlp.down_proj.weight.detach() for layer in model.model.layers]


first, second = loaded(), loaded()
print("same weights in both loads, by layer:", [bool(torch.equal(a, b)) for a, b in zip(first, second)])
END

seen=$("$python" "$folder/load.py" "$folder" 2>/dev/null | tail -n 1)
echo "$seen"
[ "$seen" = "same weights in both loads, by layer: [True, False, False, False, False, False]" ] || {
    echo "expected equal weights in the first layer alone: the finding has changed" >&2
    exit 1
}
