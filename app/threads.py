"""How long torch's threads wait for each other before they yield; import this before torch.

GNU OpenMP's threads spin for milliseconds by default. Where other processes want the same cores,
the one that is waited for then does not run: a step of small products took 20 to 30 times as long
beside others as with threads that spin for some microseconds.
"""

import os


def is_told() -> bool:
    """Whether the system says that others want the cores; threads then sleep, see neighbours.py."""
    try:
        with open("/proc/self/schedstat", encoding="ascii") as file:
            return not file.read().startswith("0 ")
    except OSError:
        return False


SPINS = "10000" if is_told() else "1000"
"""Rounds of waiting: enough to meet the next small operation, or the few of a full machine."""

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
