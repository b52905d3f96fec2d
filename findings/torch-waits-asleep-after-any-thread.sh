#!/usr/bin/env bash
# On Linux a thread that once used torch, and does nothing since, changes how every other thread's
# torch operations wait, for as long as it lives: asleep instead of spinning.
#
# Versions: torch 2.13.0+cpu (an index that has that build, such as PyTorch's own for CPUs, may have
#   to be named in PIP_EXTRA_INDEX_URL), with the GNU OpenMP library that its wheel brings.
# Seen: on two free processors, relu_ of 80,000 numbers took 3.3 us and put threads to sleep 0.000
#   times; beside such a thread 49 us and 1.0 times; and 3.3 us again after it had ended. Beside other
#   programs it is the other way round: 43 to 223 us alone, 17 to 25 with the idle thread (0.5 to 2.0
#   sleeps), as threads that sleep leave their processors to the one that is waited for.
# Why a good guess is wrong: an idle thread holds no core and no lock, and torch.get_num_threads()
#   says the same before and after. But OpenMP keeps a team of its own for every thread that
#   computed, until that thread ends, and counts all teams: with more of them than the processors
#   have room for, a thread that waits for its team sleeps after about a hundred rounds instead of
#   spinning, and is woken by the system for the next operation. Servers that answer from a pool of
#   threads (one per request, as web frameworks keep them) are in that state from the second thread
#   on, whatever GOMP_SPINCOUNT says; a benchmark with one thread never is.
# Fails if the operations of a process with an idle second thread put threads to sleep less than
#   five times as often as those of a process without, or if they sleep on after that thread ended.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
python=$folder/env/bin/python
"$python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6

cat > "$folder/idle.py" <<'END'
import os
import resource
import statistics
import threading
import time

import torch

ROUNDS = 3000
torch.set_num_threads(len(os.sched_getaffinity(0)))
x = torch.zeros(torch.get_num_threads() * 40_000)
print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
if torch.get_num_threads() < 2:
    raise SystemExit("one processor alone: threads have no one to wait for")


def sleeps(name):
    """Times that threads of this process went to sleep per operation, the least of five turns:
    other programs only add to them."""
    found, took = [], []
    for _ in range(5):
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw, time.perf_counter()
        for _ in range(ROUNDS):
            torch.relu_(x)
        took.append((time.perf_counter() - start) / ROUNDS)
        found.append((resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - before) / ROUNDS)
    least = min(found)
    print(f"{name}: {least:.3f} sleeps and {1e6 * statistics.median(took):.1f} us an operation")
    return least


def use_once_and_idle(end, used):
    torch.relu_(torch.zeros_like(x))
    used.set()
    end.wait()


torch.relu_(x)
alone = sleeps("one thread")
end, used = threading.Event(), threading.Event()
idle = threading.Thread(target=use_once_and_idle, args=(end, used))
idle.start()
used.wait()
beside = sleeps("beside a thread that used torch once")
end.set()
idle.join()
after = sleeps("after that thread ended")
assert beside > 0.3, beside
assert beside > 5 * alone, (beside, alone)
assert after < beside / 5, (after, beside)
END
"$python" "$folder/idle.py"
