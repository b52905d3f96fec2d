#!/usr/bin/env bash
# numba's fastmath makes a sum over an array run in vectors, and leaves a maximum one number at a time.
#
# Versions: numba 0.68.1, llvmlite 0.50.0, numpy 2.4.6, on an x86 processor.
# Seen: with fastmath=True the machine code of a loop that adds up a float32 array works on vectors
#   of 16 numbers (AVX-512; 8 with AVX2), that of a loop with max() works on single ones, and so
#   does one with `if x > most`, one with the conditional expression and numpy's own max. The largest
#   of 4,096 numbers took 2.5 to 2.8 us, their sum 0.2 to 0.4; a call of LLVM's own llvm.maxnum,
#   through an intrinsic of three lines, 0.3 to 0.5.
# Why a good guess is wrong: whoever writes a softmax expects its exponentials to take the time, and
#   fastmath, which permits to take numbers for no NaN and to order them anew, to turn both loops
#   into vectors. numba writes the permission on comparisons, calls and arithmetic, and LLVM looks
#   for it on the select that a maximum becomes, where numba writes none. So the pass that finds the
#   greatest logit took longer than the one with all the exponentials, and a compiled softmax was
#   half as long again as torch's; with the call it takes less than half as long as torch's.
# Fails if a maximum is computed in vectors too, or if the call or the sum is not.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
python=$folder/env/bin/python
"$python" -m pip install --quiet --disable-pip-version-check numba==0.68.1 llvmlite==0.50.0 numpy==2.4.6

cat > "$folder/greatest.py" <<'END'
import re
import time

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic


@intrinsic
def greater(context, one, other):
    def code(context, builder, signature, arguments):
        number = ir.FloatType()
        kind = ir.FunctionType(number, [number, number])
        return builder.call(builder.module.declare_intrinsic("llvm.maxnum", [number], kind), arguments)

    return types.float32(one, other), code


def total(x):
    result = np.float32(0)
    for i in range(len(x)):
        result += x[i]
    return result


def by_max(x):
    result = np.float32(-1e30)
    for i in range(len(x)):
        result = max(result, x[i])
    return result


def by_if(x):
    result = np.float32(-1e30)
    for i in range(len(x)):
        if x[i] > result:
            result = x[i]
    return result


def by_expression(x):
    result = np.float32(-1e30)
    for i in range(len(x)):
        result = x[i] if x[i] > result else result
    return result


def by_numpy(x):
    return np.max(x)


def by_call(x):
    result = np.float32(-1e30)
    for i in range(len(x)):
        result = greater(result, x[i])
    return result


def microseconds(function, x):
    taken = []
    for _ in range(500):
        start = time.perf_counter()
        function(x)
        taken.append(time.perf_counter() - start)
    return 1e6 * sorted(taken)[len(taken) // 2]


x = np.random.default_rng(0).standard_normal(4096).astype(np.float32)
in_vectors = {}
for function in (total, by_max, by_if, by_expression, by_numpy, by_call):
    compiled = numba.njit("float32(float32[::1])", fastmath=True, error_model="numpy")(function)
    assert abs(compiled(x) - (x.sum() if function is total else x.max())) < 1e-3
    code = compiled.inspect_llvm(compiled.signatures[0])
    in_vectors[function.__name__] = bool(re.search(r"= (tail )?(call|f\w+|select)\b.*<\d+ x float>", code))
    print(f"{function.__name__}: {'vectors' if in_vectors[function.__name__] else 'one by one'}, "
          f"{microseconds(compiled, x):.2f} us")
selects = [line for line in numba.njit("float32(float32[::1])", fastmath=True)(by_if)
           .inspect_llvm()[(types.float32[::1],)].splitlines() if re.search(r"= select .*float", line)]
print(*(line.strip() for line in selects[:1]), sep="\n")
assert in_vectors == {"total": True, "by_max": False, "by_if": False, "by_expression": False,
                      "by_numpy": False, "by_call": True}, in_vectors
END

"$python" "$folder/greatest.py"
