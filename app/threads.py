"""How long torch's threads wait for each other before they yield; import this before torch.

GNU OpenMP's threads spin for milliseconds by default. Where other processes want the same cores,
the one that is waited for then does not run: a step of small products took 20 to 30 times as long
beside others as with threads that spin for some microseconds.
"""

import os

SPINS = "1000"
"""Rounds of waiting; OpenMP's own number for when there are more threads than cores."""

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
