"""How long torch's threads wait for each other before they yield, on the command line.

GNU OpenMP's threads spin for milliseconds by default. Where other processes want the same cores,
the one that is waited for then does not run: a step of small products took 20 to 30 times as long
beside others as with threads that spin for some microseconds. OpenMP reads the setting when torch
loads, and Python imports this package, hence torch, before its `__main__`: so the package imports
this module first of all. A program that uses the package as a library decides for itself.
"""

import os
import sys


def is_told() -> bool:
    """Whether the system says that others want the cores; threads then sleep, see neighbours.py."""
    try:
        with open("/proc/self/schedstat", encoding="ascii") as file:
            return not file.read().startswith("0 ")
    except OSError:
        return False


SPINS = "10000" if is_told() else "1000"
"""Rounds of waiting: enough to meet the next small operation, or the few of a full machine."""


def is_command_line() -> bool:
    """Whether Python is looking for this package's `__main__`: `python -m dynamickv`."""
    # Until that is found, "-m" stands where the program's file will, and the module's name is
    # what stood before the other arguments.
    looking = sys.argv[:1] == ["-m"]
    return looking and sys.orig_argv[-len(sys.argv)].removeprefix("-m") == "dynamickv"


if is_command_line() and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
