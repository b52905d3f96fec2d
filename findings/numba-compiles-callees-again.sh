#!/usr/bin/env bash
# numba compiles a function anew inside every other compiled function that calls it, and in theirs.
#
# Versions: numba 0.68.1, llvmlite 0.50.0, numpy 2.4.6.
# Seen: a kernel of 24 loops takes 1.1 s to compile. A function that does nothing but call it, the kernel
#   being compiled already, takes 0.27 s more, one that calls that one 0.26, and so on; the machine
#   code of each holds the whole kernel once more. A function that calls the same kernel by its
#   address takes 0.03 s, and holds none of it.
# Why a good guess is wrong: with its signature given, a function is compiled where it is written, and
#   one would expect a call of it to be a call: a jump to code that is there. numba links the callee's
#   intermediate code into the caller's module and runs LLVM's passes over all of it, however far down
#   the kernel lies, and the same again when caches on disk are filled. So splitting a kernel for
#   attention into layers that each only pass on (a share of the work, its thread's function, the
#   entry) multiplied what users of a new machine wait for: of one kernel's 8 s, 2.5 went.
# Fails if a caller no longer holds its callee's code, or if the call by address does.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
python=$folder/env/bin/python
"$python" -m pip install --quiet --disable-pip-version-check numba==0.68.1 llvmlite==0.50.0 numpy==2.4.6

cat > "$folder/chain.py" <<'END'
import time

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

SIGNATURE = "void(float32[:, ::1])"


@intrinsic
def call_at(context, address, told):
    """Call the function at an address with one number."""

    def code(context, builder, signature, arguments):
        word = ir.IntType(64)
        pointer = ir.FunctionType(ir.VoidType(), [word]).as_pointer()
        builder.call(builder.inttoptr(arguments[0], pointer), [arguments[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), code


def source(loops):
    lines = ["def kernel(x):"]
    for number in range(loops):
        lines += [
            "    for i in range(len(x)):",
            "        for j in range(x.shape[1]):",
            f"            x[i, j] = x[i, j] * np.float32({number + 2}) / (x[i, j] * x[i, j] + np.float32({number + 1}))",
        ]
    return "\n".join(lines)


def timed(make):
    start = time.perf_counter()
    made = make()
    return made, time.perf_counter() - start


made = {"np": np}
exec(source(24), made)
numba.njit("int64(int64)")(lambda x: x + 1)  # what numba does once is in nobody's time
kernel, took = timed(lambda: numba.njit(SIGNATURE, fastmath=True, error_model="numpy")(made["kernel"]))


def passing_on(callee):
    def caller(x):
        callee(x)

    return timed(lambda: numba.njit(SIGNATURE, error_model="numpy")(caller))


def divisions(function):
    """Of the kernel's own instructions."""
    return sum("vdiv" in line or "divss" in line or "divps" in line
               for line in function.inspect_asm(function.signatures[0]).splitlines())


own = divisions(kernel)
print(f"kernel: {took:.2f} s, {own} divisions")
assert own >= 24, own
callee, seconds = kernel, []
for depth in range(1, 4):
    callee, took = passing_on(callee)
    seconds.append(took)
    print(f"caller {depth} deep: {took:.2f} s, {divisions(callee)} divisions")
    assert divisions(callee) >= own, (divisions(callee), own)


def by_address(address, told):
    call_at(address, told)


apart, took = timed(lambda: numba.njit("void(int64, int64)", error_model="numpy")(by_address))
print(f"by address: {took:.2f} s, {divisions(apart)} divisions")
assert divisions(apart) == 0

thing = numba.cfunc("void(int64)")(lambda told: None)
apart(thing.address, 0)
x = np.ones((4, 64), np.float32)
expected = x.copy()
kernel(expected)
callee(x)
assert np.array_equal(x, expected)
END

"$python" "$folder/chain.py"
