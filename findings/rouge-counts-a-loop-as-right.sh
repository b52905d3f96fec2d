#!/usr/bin/env bash
# ROUGE-L of the package rouge gives an answer that says the right sentence 50 times the full score.
#
# Versions: rouge 1.0.1.
# Seen: against "the cat sat on the mat and went home", the same sentence scores 1.0 once and 1.0
#   said 50 times in a row (to 8 digits).
# Why a good guess is wrong: ROUGE-L is an F-measure, so an answer fifty times as long as the
#   reference should lose its precision (1/50, an F of about 0.04). This package makes sets of the
#   words on both sides before it counts, so that a word counts once. It is what LongBench's
#   summarisation scores are computed with: a compressed cache that makes a model go round in
#   circles costs nothing there.
# Fails if the repeated answer scores less.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
python=$folder/env/bin/python
"$python" -m pip install --quiet --disable-pip-version-check rouge==1.0.1

cat > "$folder/score.py" <<'END'
from rouge import Rouge


def score(answer: str, reference: str) -> float:
    return Rouge(metrics=["rouge-l"]).get_scores([answer], [reference], avg=True)["rouge-l"]["f"]


right = "the cat sat on the mat and went home"
print(*(f"{score(answer, right):.6f}" for answer in (right, f"{right} " * 50)))
END

seen=$("$python" "$folder/score.py")
echo "ROUGE-L, rouge 1.0.1: said once and 50 times: $seen"
[ "$seen" = "1.000000 1.000000" ] || { echo "expected the full score twice: the finding has changed" >&2; exit 1; }
