#!/usr/bin/env bash
# numba gives an array back after its last mention, while the function that made it still uses its address.
#
# Versions: numba 0.68.1, llvmlite 0.50.0, numpy 2.4.6.
# Seen: a compiled function makes an array, takes `array.ctypes.data` and calls another by address with it,
#   as one does to let the threads of an OpenMP runtime work on it. When the other runs, numba's own
#   count of allocations says that none is left: the array is already free. With a line that mentions
#   the array after the call, such as `array[0] = 0`, one is left.
# Why a good guess is wrong: a local variable lives until its function returns, in C and C++ as in
#   Python, where `array.ctypes` even holds the array. numba counts references too, but drops its own
#   after the last line that names the variable, and an address names nothing. With most allocators
#   what was given back stays readable for a while, so that results are right in every test of one
#   thread, and wrong when another thread asks for memory at that moment.
# Fails if the array is still there when only its address is in use, or is gone where it is mentioned
#   afterwards. Nothing reads the memory here.
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


@numba.njit("void(int64, int64)")
def address_alone(use, size):
    array = np.zeros(size, np.float32)
    call_at(use, np.int64(array.ctypes.data))


@numba.njit("void(int64, int64)")
def mentioned_after(use, size):
    array = np.zeros(size, np.float32)
    call_at(use, np.int64(array.ctypes.data))
    array[0] = 0


def left():
    """Allocations of numba's that were not given back."""
    told = rtsys.get_allocation_stats()
    return told.alloc - told.free


seen = []
user = ctypes.CFUNCTYPE(None, ctypes.c_int64)(lambda address: seen.append(left()))
found = {}
for function in (address_alone, mentioned_after):
    before = left()
    function(ctypes.cast(user, ctypes.c_void_p).value, 1000)
    found[function.__name__] = seen.pop() - before
    print(f"{function.__name__}: arrays there while the address is in use: {found[function.__name__]}")
    assert left() == before
assert found == {"address_alone": 0, "mentioned_after": 1}, found
END

NUMBA_NRT_STATS=1 "$python" "$folder/address.py"
