#!/usr/bin/env bash
# A GGUF that says how its rotary positions are scaled is loaded as if it had said nothing.
#
# Versions: transformers 5.24.0, gguf 0.19.0, torch 2.13.0.
# Seen: a llama file with rope.scaling.type linear, factor 8, original context 512, and the tensor
#   rope_freqs.weight. The model that comes back has rope type "default", no factor, and the fastest
#   frequency 1.0 where the file asks for 1/8. No missing key, no unexpected tensor, no warning.
# Why a good guess is wrong: transformers reads the file's rope.freq_base and rope.dimension_count, so
#   the rest of the family seems read, too; and a short text is answered well, because scaling only
#   matters where positions grow. Llama 3.1 (rope_freqs.weight) and every long-context file lose what
#   makes them long.
# Fails if the scaling arrives in the config, or is refused.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
python=$folder/env/bin/python
"$python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0 numpy==2.4.6

cat > "$folder/rope.py" <<'END'
import tempfile
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM

HEADS, DIM, LAYERS, HIDDEN, FFN, WORDS = 4, 16, 2, 64, 128, 64


def write(path: Path) -> None:
    """A llama file that says, as Llama 3.1's and every long-context conversion do, how its positions are scaled."""
    file = gguf.GGUFWriter(path, "llama")
    file.add_context_length(4096)
    file.add_embedding_length(HIDDEN)
    file.add_block_count(LAYERS)
    file.add_feed_forward_length(FFN)
    file.add_head_count(HEADS)
    file.add_head_count_kv(HEADS)
    file.add_rope_dimension_count(DIM)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_rope_freq_base(10000.0)
    file.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    file.add_rope_scaling_factor(8.0)
    file.add_rope_scaling_orig_ctx_len(512)
    file.add_vocab_size(WORDS)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (WORDS, HIDDEN), "output": (WORDS, HIDDEN), "output_norm": (HIDDEN,)}
    for n in range(LAYERS):
        shapes |= {f"blk.{n}.{name}": (HIDDEN, HIDDEN) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
        shapes |= {f"blk.{n}.{name}": (HIDDEN,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{n}.ffn_gate": (FFN, HIDDEN), f"blk.{n}.ffn_up": (FFN, HIDDEN), f"blk.{n}.ffn_down": (HIDDEN, FFN)}
    for name, shape in shapes.items():
        file.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(np.float32))
    file.add_tensor("rope_freqs.weight", np.full(DIM // 2, 8.0, dtype=np.float32))
    file.write_header_to_file(), file.write_kv_data_to_file(), file.write_tensors_to_file()
    file.close()


with tempfile.TemporaryDirectory() as folder:
    write(Path(folder, "x.gguf"))
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="x.gguf")
    kept = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    fastest = model.model.rotary_emb.inv_freq[0].item()
    print(model.config.rope_parameters["rope_type"], model.config.rope_parameters.get("factor"), fastest)
END

seen=$("$python" "$folder/rope.py" 2>/dev/null | tail -n 1)
echo "rope type, factor, fastest frequency: $seen"
[ "$seen" = "default None 1.0" ] || { echo "expected default None 1.0: the finding has changed" >&2; exit 1; }
