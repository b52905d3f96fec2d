#!/usr/bin/env bash
# The attention weights that granite_swa returns are not the ones it applies: the sinks are left out.
#
# Versions: transformers 5.24.0, torch 2.13.0.
# Seen: one layer with every learned sink set to 5. The logits move, so the sinks are applied; yet
#   each row of output_attentions still sums to 1. gpt_oss, with the same kind of parameter under
#   the same name, returns rows that sum to 0.0something: what the sink took is missing from them.
# Why a good guess is wrong: both are "eager attention with learned sinks", and eager is chosen just
#   to see the weights. granite_swa scales the attention's output afterwards, by how much of a row a
#   sink would have taken, and returns what softmax gave before. Importance that is read off these
#   weights counts heads that the sink has switched off as fully as all others.
# Fails if the returned rows of granite_swa no longer sum to 1, or those of gpt_oss do.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
python=$folder/env/bin/python
"$python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0

cat > "$folder/sinks.py" <<'END'
import torch
from transformers import GptOssConfig, GptOssForCausalLM, GraniteSWAConfig, GraniteSWAForCausalLM

SIZES = dict(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, pad_token_id=0, attn_implementation="eager",
)


def sums(kind, config) -> tuple[float, bool]:
    """What a row of the returned attention sums to with a large sink, and whether the sink moved the logits."""
    torch.manual_seed(0)
    model = kind(config).eval()
    prompt = torch.randint(1, 97, (1, 12))
    with torch.inference_mode():
        before = model(prompt).logits
        for name, weight in model.named_parameters():
            if name.endswith("sinks"):
                weight.fill_(5.0)
        after = model(prompt, output_attentions=True)
    return after.attentions[0].sum(-1).mean().item(), not torch.allclose(before, after.logits)


granite, moved = sums(GraniteSWAForCausalLM, GraniteSWAConfig(**SIZES))
gpt, also_moved = sums(GptOssForCausalLM, GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1))
print(round(granite, 3), moved, gpt < 0.5, also_moved)
END

seen=$("$python" "$folder/sinks.py" 2>/dev/null | tail -n 1)
echo "granite_swa: rows sum to, sinks move logits; gpt_oss: rows sum to less than a half, sinks move logits: $seen"
[ "$seen" = "1.0 True True True" ] || { echo "expected 1.0 True True True: the finding has changed" >&2; exit 1; }
