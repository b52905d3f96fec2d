#!/usr/bin/env bash
# transformers' save_pretrained writes no model in any process of a group but the first.
#
# Versions: transformers 5.24.0, torch 2.13.0.
# Seen: two processes in one torch.distributed group (gloo). Each makes a tiny Llama of its own that is
#   not distributed in any way and calls save_pretrained(folder, is_main_process=True) with a folder of
#   its own. The first one's holds config.json, generation_config.json and model.safetensors; the
#   second one's was made and is empty. There is no error, no warning and no word in the log. The
#   config's own save_pretrained writes its file in both processes, and once the group is gone the
#   model's writes all three in both.
# Why a good guess is wrong: is_main_process is documented as the caller's choice of the process that
#   writes ("set is_main_process=True only on the main process") and is True by default, so whoever
#   lets one process save, or gives each a folder of its own, has no race to fear and no flag to set.
#   The choice counts only together with rank 0 of whatever group exists, whether the model has
#   anything to do with it or not. What was to be made once, by the process that comes first, is made
#   only when that happens to be rank 0.
# Fails if the second process writes a file, the first does not, or something is said.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
python=$folder/env/bin/python
"$python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 numpy==2.4.6

cat > "$folder/save.py" <<'END'
import logging
import sys
import warnings
from pathlib import Path

import torch.distributed
import torch.multiprocessing
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
FILES = ["config.json", "generation_config.json", "model.safetensors"]


class Kept(logging.Handler):
    """Keeps every message of a warning's level or above."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.said = []

    def emit(self, record):
        self.said.append(record.getMessage())


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def save(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2
    )
    kept = Kept()
    logging.getLogger("transformers").addHandler(kept)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model_folder, config_folder, after = (folder / f"{name}-{rank}" for name in ("model", "config", "after"))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        model.save_pretrained(model_folder, is_main_process=True)
    said = len(warned) + len(kept.said)
    model.config.save_pretrained(config_folder)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    model.save_pretrained(after, is_main_process=True)
    (folder / f"seen-{rank}").write_text(
        f"rank {rank}: model {files(model_folder)}, said {said}, config {files(config_folder)},"
        f" all without a group {files(after) == FILES}\n"
    )


if __name__ == "__main__":
    torch.multiprocessing.spawn(save, (Path(sys.argv[1]),), nprocs=2)
END

"$python" "$folder/save.py" "$folder" >"$folder/log" 2>&1 || { tail -n 20 "$folder/log" >&2; exit 1; }
seen=$(cat "$folder/seen-0" "$folder/seen-1")
echo "$seen"
[ "$seen" = "rank 0: model ['config.json', 'generation_config.json', 'model.safetensors'], said 0, config ['config.json'], all without a group True
rank 1: model [], said 0, config ['config.json'], all without a group True" ] || {
    echo "expected an empty folder in rank 1 and three files in rank 0: the finding has changed" >&2
    exit 1
}
