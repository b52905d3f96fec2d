#!/usr/bin/env bash
# A numba function that does not name fastmath takes it from whoever has it compiled first, for good.
#
# Versions: numba 0.68.1, llvmlite 0.50.0, numpy 2.4.6.
# Seen: a compensated sum (Kahan's), decorated with a plain @njit, adds 10,000,000 times 0.1 in float32
#   to 1,000,000 if it is called before a fastmath function calls it, in both from then on. If the
#   fastmath function is compiled first, both give 998,501.375, its own direct call as well, from the
#   one version that there then is. With fastmath=False written out, or with a signature, it keeps
#   its own. With inline="always" not even fastmath=False helps; and the other way round an inlined
#   fastmath function loses it in a caller without: of its additions none carries the flag.
# Why a good guess is wrong: fastmath is an option of the decorator and off by default, so a helper that
#   must not be reordered, such as the compensated sum under a softmax, looks safe without naming it.
#   But what an option leaves open numba takes from the function being compiled around it, and the
#   compiled version is kept under the argument types alone: an import or a test that calls things in
#   another order changes the result. inline="always" pastes the code into the caller before any flag
#   is given, so that an exponential which is fast in one caller is not in the next (in a cfunc, say).
# Fails if the order of the calls does not matter, or if inlining keeps the function's own fastmath.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
python=$folder/env/bin/python
"$python" -m pip install --quiet --disable-pip-version-check numba==0.68.1 llvmlite==0.50.0 numpy==2.4.6

cat > "$folder/first.py" <<'END'
import re

import numba
import numpy as np

COUNT = 10_000_000
TENTH = np.float32(0.1)


def compensated(x, count):
    total, lost = np.float32(0), np.float32(0)
    for _ in range(count):
        more = x - lost
        grown = total + more
        lost = (grown - total) - more
        total = grown
    return total


def summed(x):
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i]
    return total


def fast_caller_of(function):
    @numba.njit(fastmath=True)
    def caller(x, count):
        return function(x, count)

    return caller


def results(first, *signature, **options):
    """What the function and its fastmath caller say, whichever is called first."""
    function = numba.njit(*signature, **options)(compensated)
    pair = {"itself": function, "caller": fast_caller_of(function)}
    order = [first, *(name for name in pair if name != first)]
    said = {name: float(pair[name](TENTH, COUNT)) for name in order}
    assert len(function.signatures) == 1 or options.get("inline") == "always"
    return said["itself"], said["caller"]


found = {
    "plain, itself first": results("itself"),
    "plain, caller first": results("caller"),
    "fastmath=False, caller first": results("caller", fastmath=False),
    "signature, caller first": results("caller", "float32(float32, int64)"),
    "inline, fastmath=False, itself first": results("itself", inline="always", fastmath=False),
}
for name, (itself, caller) in found.items():
    print(f"{name}: called directly {itself:,.3f}, by the fastmath function {caller:,.3f}")

flagged = {}
for inline in ("never", "always"):
    fast = numba.njit(inline=inline, fastmath=True)(summed)

    @numba.njit("float32(float32[::1])")
    def by_careful(x):
        return fast(x)

    text = next(iter(by_careful.inspect_llvm().values()))
    flagged[inline] = bool(re.search(r"= fadd fast ", text)), bool(re.search(r"= fadd (?!fast)", text))
    print(f"additions of a fastmath function, inline={inline!r}, in a caller without: "
          f"with the flag {flagged[inline][0]}, without {flagged[inline][1]}")

right = 1_000_000.0
assert found["plain, itself first"] == (right, right), found
assert all(abs(value - right) > 1000 for value in found["plain, caller first"]), found
assert found["fastmath=False, caller first"] == (right, right), found
assert found["signature, caller first"] == (right, right), found
assert found["inline, fastmath=False, itself first"][0] == right, found
assert abs(found["inline, fastmath=False, itself first"][1] - right) > 1000, found
assert flagged == {"never": (True, False), "always": (False, True)}, flagged
END

"$python" "$folder/first.py"
