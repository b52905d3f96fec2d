"""python -m benchmarks.coverage.worker: a name per line in, a line of JSON out."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import sys
import warnings

MEMORY = 8 * 2**30
"""Bytes of address space: a model that does not shrink fails here, not by taking the machine's."""


def main() -> None:
    """Examine what is asked for until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    # What libraries print goes elsewhere: the answers have the output to themselves.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    import torch
    import transformers

    from benchmarks.coverage.check import examine

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    for line in sys.stdin:
        print(json.dumps(dataclasses.asdict(examine(line.strip()))), file=answers, flush=True)


if __name__ == "__main__":
    main()
