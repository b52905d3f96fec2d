#!/usr/bin/env bash
# The package rouge scores the same two texts or raises RecursionError, by how deep its caller is.
#
# Versions: rouge 1.0.1, on Python's usual recursion limit of 1000.
# Seen: two equal texts of 900 words without a full stop score 1.0 when a script calls the scorer
#   itself, and raise RecursionError when the same call is made 150 calls further down. A text of 300
#   words scores 1.0 in both places.
# Why a good guess is wrong: a metric of two strings reads like a pure function, and a length limit
#   like a property of the texts. But the longest common subsequence is read back by a recursion of
#   one call per word, which shares the stack with whoever called. LongBench's scorer catches
#   every error as a score of 0, so a long sentence scores in a plain script and is worth nothing
#   under a test runner, a web framework or a notebook.
# Fails if both places agree.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
python=$folder/env/bin/python
"$python" -m pip install --quiet --disable-pip-version-check rouge==1.0.1

cat > "$folder/score.py" <<'END'
from rouge import Rouge


def score(words: int, calls: int) -> str:
    if calls:
        return score(words, calls - 1)
    text = " ".join(f"w{number}" for number in range(words))
    try:
        return f'{Rouge(metrics=["rouge-l"]).get_scores([text], [text], avg=True)["rouge-l"]["f"]:.1f}'
    except RecursionError:
        return "RecursionError"


print(*(score(words, calls) for words in (300, 900) for calls in (0, 150)))
END

seen=$("$python" "$folder/score.py")
echo "300 words at depth 0 and 150, 900 words at depth 0 and 150: $seen"
[ "$seen" = "1.0 1.0 1.0 RecursionError" ] || { echo "expected 1.0 1.0 1.0 RecursionError: the finding has changed" >&2; exit 1; }
