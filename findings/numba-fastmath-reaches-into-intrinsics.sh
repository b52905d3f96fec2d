#!/usr/bin/env bash
# numba's fastmath marks the instructions that an @intrinsic emits, too, which never asked for it.
#
# Versions: numba 0.68.1, llvmlite 0.50.0, numpy 2.4.6.
# Seen: an intrinsic writes two LLVM instructions, x + 12582912 and that - 12582912, without a flag: as
#   written they round x to a whole number. Called from a plain @njit they do, 2.25 gives 2.0. Called
#   from @njit(fastmath=True) 2.25 comes back, and the compiled code holds no addition at all. With
#   fastmath={"contract"} it rounds again.
# Why a good guess is wrong: an intrinsic is the way to give numba instructions of one's own, and
#   llvmlite lets each of them name its flags, so one takes them to be compiled as they were written.
#   But numba goes over the finished module once more and puts the caller's flags on every operation
#   on floats that has none, wherever it came from. Rounding by a great number, sums with compensation
#   and splitting a number in two are dissolved so: an exponential for attention weights, made of a
#   look-up and what rounding leaves over, lost what is left over and was up to 2 per cent off, and
#   right in every test that called it by itself. An instruction of the CPU's, called by its name,
#   is left alone.
# Fails if the intrinsic rounds under fastmath, or if it does not without.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
python=$folder/env/bin/python
"$python" -m pip install --quiet --disable-pip-version-check numba==0.68.1 llvmlite==0.50.0 numpy==2.4.6

cat > "$folder/flags.py" <<'END'
import numba
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

GREAT = 1.5 * 2.0**23


@intrinsic
def rounded(context, x):
    """To a whole number, by adding a great one and taking it off again."""

    def code(context, builder, signature, arguments):
        great = ir.Constant(ir.FloatType(), GREAT)
        return builder.fsub(builder.fadd(arguments[0], great), great)

    return types.float32(types.float32), code


def seen(fastmath):
    @numba.njit("float32(float32)", fastmath=fastmath)
    def call(x):
        return rounded(x)

    (module,) = call.inspect_llvm().values()
    additions = module.count(" fadd ") + module.count(" fsub ")
    print(f"fastmath={fastmath}: 2.25 gives {call(2.25)}, additions and subtractions left: {additions}")
    return call(2.25), additions > 0


assert seen(False) == (2.0, True)
assert seen({"contract"}) == (2.0, True)
assert seen(True) == (2.25, False)
END
"$python" "$folder/flags.py"
