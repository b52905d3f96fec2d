#!/usr/bin/env bash
# numba gives an array back while its address is in use, once an `if` or a loop stands between the two.
#
# Versions: numba 0.68.1, llvmlite 0.50.0, numpy 2.4.6.
# Seen: a compiled function makes an array, takes `array.ctypes.data` and calls another by address with it,
#   as one does to let the threads of an OpenMP runtime work on it. Where the call stands in a loop or
#   under an `if`, numba's own count of allocations says, while the other runs, that none is left: the
#   array is already free. With a line that mentions the array after it, such as `array[0] = 0`, one is
#   left, and so it is where the call stands in one line of statements with the rest.
# Why a good guess is wrong: a local variable lives until its function returns, in C and C++ as in
#   Python, where `array.ctypes` even holds the array. numba counts references too, but drops its own
#   where no later block of the code names the variable, and an address names nothing. With most
#   allocators what was given back stays readable for a while, so that results are right in every
#   test of one thread, and wrong when another thread asks for memory at that moment; and a function
#   that was safe is so no longer once someone writes an `if` around its call.
# Fails if the array is still there when only its address is in use under an `if` or in a loop, or is
#   gone in the other two cases. Nothing reads the memory here.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
python=$folder/env/bin/python
"$python" -m pip install --quiet --disable-pip-version-check numba==0.68.1 llvmlite==0.50.0 numpy==2.4.6

cat > "$folder/address.py" <<'END'
import ctypes

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.core.runtime import rtsys
from numba.extending import intrinsic


@intrinsic
def call_at(context, function, told):
    """Call the function at an address with one number."""

    def code(context, builder, signature, arguments):
        word = ir.IntType(64)
        pointer = ir.FunctionType(ir.VoidType(), [word]).as_pointer()
        builder.call(builder.inttoptr(arguments[0], pointer), [arguments[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), code


def in_one_line(use, size):
    array = np.zeros(size, np.float32)
    address = np.int64(array.ctypes.data)
    call_at(use, address)


def under_an_if(use, size):
    array = np.zeros(size, np.float32)
    address = np.int64(array.ctypes.data)
    if size > 3:
        call_at(use, address)


def in_a_loop(use, size):
    array = np.zeros(size, np.float32)
    address = np.int64(array.ctypes.data)
    for _ in range(size // 500):
        call_at(use, address)


def mentioned_after(use, size):
    array = np.zeros(size, np.float32)
    address = np.int64(array.ctypes.data)
    for _ in range(size // 500):
        call_at(use, address)
    array[0] = 0


def left():
    """Allocations of numba's that were not given back."""
    told = rtsys.get_allocation_stats()
    return told.alloc - told.free


seen = []
user = ctypes.CFUNCTYPE(None, ctypes.c_int64)(lambda address: seen.append(left()))
found = {}
for function in (in_one_line, under_an_if, in_a_loop, mentioned_after):
    compiled = numba.njit("void(int64, int64)")(function)
    before = left()
    compiled(ctypes.cast(user, ctypes.c_void_p).value, 1000)
    found[function.__name__] = [there - before for there in seen]
    seen.clear()
    print(f"{function.__name__}: arrays there while the address is in use: {found[function.__name__]}")
    assert left() == before
assert found == {"in_one_line": [1], "under_an_if": [0], "in_a_loop": [0, 0],
                 "mentioned_after": [1, 1]}, found
END

NUMBA_NRT_STATS=1 "$python" "$folder/address.py"
