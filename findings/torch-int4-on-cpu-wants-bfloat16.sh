#!/usr/bin/env bash
# torch's product with four-bit weights on a CPU is fast in one of the three formats that it takes.
#
# Versions: torch 2.13.0+cpu, on an x86 processor with AVX-512 (an index that has that build, such
#   as PyTorch's own for CPUs, may have to be named in PIP_EXTRA_INDEX_URL).
# Seen: one row times 3,072 x 576 packed four-bit weights in groups of 32, on one core: 0.12 to
#   0.16 ms in bfloat16, 4.6 to 4.9 in float32, 6.4 to 6.9 in float16; the same results but for
#   rounding. torch's own product with the unpacked float32 matrix, eight times the bytes: 0.33 ms.
# Why a good guess is wrong: the product is bound by the weights' bytes, which are the same in all
#   three, and float32 spares the conversions; whoever wants unrounded activations gets them without
#   an error or a warning, and a step slower than one without any quantization. On x86 its source
#   has vector code for bfloat16 alone (on Arm for all three).
# Fails if float32 takes less than 5 times as long as bfloat16, or less than the unpacked product.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
python=$folder/env/bin/python
"$python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6

cat > "$folder/time.py" <<'END'
import time

import torch

OUTPUTS, INPUTS, GROUP = 3072, 576, 32
torch.manual_seed(0)
# Alone, as threads that wait for each other would be what is timed beside other work.
torch.set_num_threads(1)


def milliseconds(product):
    seconds = []
    for _ in range(25):
        start = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - start)
    return 1000 * min(seconds)


codes = torch.randint(0, 16, (OUTPUTS, INPUTS), dtype=torch.int32)
packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
scales = torch.full((INPUTS // GROUP, OUTPUTS, 2), 0.125)
scales[..., 1] = 0
x = torch.randn(1, INPUTS)
weight = (codes.float() - 8) * 0.125
wanted = torch.nn.functional.linear(x, weight)
took = {"unpacked": milliseconds(lambda: torch.nn.functional.linear(x, weight))}
print(f"float32, unpacked: {took['unpacked']:.3f} ms")
for dtype in (torch.bfloat16, torch.float32, torch.float16):
    row, own = x.to(dtype), scales.to(dtype)

    def product():
        return torch.ops.aten._weight_int4pack_mm_for_cpu(row, packed, GROUP, own)

    away = float((product().float() - wanted).norm() / wanted.norm())
    took[dtype] = milliseconds(product)
    print(f"{dtype}, four bits: {took[dtype]:.3f} ms, relative error {away:.1e}")
    assert away < 0.02, "the product is another one"
slow = took[torch.float32] > 5 * took[torch.bfloat16] and took[torch.float32] > took["unpacked"]
raise SystemExit(not slow)
END
"$python" "$folder/time.py" || {
    echo "expected float32 to be much slower than bfloat16: the finding has changed" >&2
    exit 1
}
