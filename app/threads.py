"""How long torch's threads wait for each other before they yield; import this before torch.

GNU OpenMP's threads spin for milliseconds by default. Where other processes want the same cores,
the one that is waited for then does not run: a step of small products took 20 to 30 times as long
beside others as with threads that soon yield.
"""

import os

SPINS = "10000"
"""Rounds of waiting, some tenths of a millisecond: longer than what lies between two products of a
step, whose threads would have to be woken again for each (a step then takes a sixth longer)."""

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
