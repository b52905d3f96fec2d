"""Print the folder of the embedded model's safetensors, for engines that read only those."""

from __future__ import annotations

import dynamickv as dkv
from dynamickv.models import KNOWN_MODELS, embedded_file
from dynamickv.models.conversion import converted


def main() -> None:
    """Convert it if that was not done yet."""
    file = embedded_file(KNOWN_MODELS[dkv.DEFAULT_MODEL])
    if file is None:
        raise SystemExit("the embedded model is not installed; run make setup")
    print(converted(file))


if __name__ == "__main__":
    main()
