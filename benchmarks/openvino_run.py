"""OpenVINO GenAI on given tokens, its cache evicted. Runs in its own environment (make openvino),
without this project.

python benchmarks/openvino_run.py < request.json

The request is {model, tokens, steps, rounds, threads, capacity}: a model's file or folder, token
ids, decoding steps, and the most tokens that the cache is to keep, a multiple of 32. The answer,
one line of JSON, is {decode: [median seconds per token, one per round], peak_tokens, held_tokens,
token_bytes}: tokens in the cache at most and at the end, in whole blocks, and bytes of one in all
layers.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import numpy as np
from openvino import Tensor
from openvino_genai import (
    AggregationMode,
    CacheEvictionConfig,
    ContinuousBatchingPipeline,
    GenerationConfig,
    SchedulerConfig,
)

BLOCK = 32
"""Tokens of a block on a CPU."""
START, RECENT = 32, 64
"""First and last tokens that are never evicted."""


def main() -> None:
    """Answer the request."""
    asked = json.load(sys.stdin)
    blocks = -(-(len(asked["tokens"]) + asked["steps"] + 1) // BLOCK) + 1
    pipeline = pipeline_of(asked, blocks)
    rounds = [answer(pipeline, asked, number) for number in range(asked["rounds"] + 1)]
    used = [share for _, shares in rounds for share in shares]
    token_bytes = pipeline.get_metrics().cache_size_in_bytes / blocks / BLOCK
    found = {
        "decode": [seconds for seconds, _ in rounds[1:]],  # the first one warms up
        "peak_tokens": round(max(used) / 100 * blocks) * BLOCK,
        "held_tokens": round(used[-1] / 100 * blocks) * BLOCK,
        "token_bytes": token_bytes,
    }
    print(json.dumps(found))


def pipeline_of(asked: dict[str, Any], blocks: int) -> ContinuousBatchingPipeline:
    """The model with room for one request, read in one piece."""
    scheduler = SchedulerConfig()
    scheduler.num_kv_blocks = blocks
    scheduler.max_num_batched_tokens = len(asked["tokens"])
    scheduler.use_cache_eviction = True
    scheduler.cache_eviction_config = CacheEvictionConfig(
        START, RECENT, asked["capacity"], AggregationMode.NORM_SUM
    )
    properties = {"INFERENCE_NUM_THREADS": asked["threads"]}
    return ContinuousBatchingPipeline(asked["model"], scheduler, "CPU", properties)


def answer(
    pipeline: ContinuousBatchingPipeline, asked: dict[str, Any], number: int
) -> tuple[float, list[float]]:
    """Median seconds of a step once the cache is evicted, and the percentage of all blocks that was
    in use after every step.

    Raises:
        SystemExit: not all tokens came; a prompt that does not fit ends without any, or a word.
    """
    config = GenerationConfig()
    config.max_new_tokens, config.ignore_eos, config.do_sample = asked["steps"] + 1, True, False
    ids = Tensor(np.array([asked["tokens"]], dtype=np.int64))
    request = pipeline.add_request(number, ids, config)
    seconds, used, came = [], [], 0
    while pipeline.has_non_finished_requests():
        start = time.perf_counter()
        pipeline.step()
        seconds.append(time.perf_counter() - start)
        used.append(pipeline.get_metrics().cache_usage)
        while request.can_read():
            came += sum(len(output.generated_ids) for output in request.read().values())
    if came != config.max_new_tokens or len(seconds) != config.max_new_tokens:
        raise SystemExit(
            f"OpenVINO GenAI gave {came} of {config.max_new_tokens} tokens in {len(seconds)} steps "
            f"({request.get_status()}): raise num_kv_blocks"
        )
    # The first step reads the prompt, the second one still attends to all of it.
    return statistics.median(seconds[2:]), used


if __name__ == "__main__":
    main()
