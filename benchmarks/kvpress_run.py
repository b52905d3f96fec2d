"""kvpress's own pipeline, one method after another. Runs in kvpress's environment (make kvpress).

python -m benchmarks.kvpress_run MODEL_FOLDER DOCUMENT QUESTION TOKENS RATIO -> JSON of seconds
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import kvpress  # noqa: F401  registers the pipeline
import torch
from kvpress import ObservedAttentionPress, PyramidKVPress, SnapKVPress, StreamingLLMPress
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline


def main() -> None:
    """Time each method on one document, the model loaded before."""
    folder, document, question, tokens = sys.argv[1:5]
    text, ratio = Path(document).read_text("utf-8"), float(sys.argv[5])
    seconds: dict[str, float] = {}
    # kvpress's PyramidKV fails on a question of several tokens (0.5.5); a failure is reported.
    for name, press in (
        ("none", None),
        ("StreamingLLM", StreamingLLMPress(ratio)),
        ("SnapKV", SnapKVPress(ratio)),
        ("PyramidKV", PyramidKVPress(ratio)),
        ("ObservedAttention", ObservedAttentionPress(ratio)),
    ):
        attention = "eager" if name == "ObservedAttention" else "sdpa"
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=attention
        )
        pipe = pipeline(
            "kv-press-text-generation",
            model=model,
            tokenizer=AutoTokenizer.from_pretrained(folder),
            device="cpu",
        )
        start = time.perf_counter()
        try:
            pipe(text, question=question, press=press, max_new_tokens=int(tokens))
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
        seconds[name] = time.perf_counter() - start
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
