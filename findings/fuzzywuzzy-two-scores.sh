#!/usr/bin/env bash
# fuzzywuzzy's fuzz.ratio gives two scores for the same strings, 0 and 100.
#
# Versions: fuzzywuzzy 0.18.0, alone and beside python-Levenshtein 0.27.1 (rapidfuzz 3.14.6).
# Seen: alone it uses Python's difflib, and the matcher of python-Levenshtein as soon as that is
#   installed. The lists "0, 1, ... 199" and "1, 2, ... 200" score 0 alone and 100 beside it.
# Why a good guess is wrong: its warning names speed alone ("Using slow pure-python
#   SequenceMatcher") and its README "differing results for certain cases", which reads as
#   rounding. But difflib takes characters that are frequent in a string of 200 and more for junk
#   (autojunk; without it the two lists score 0.996), so that code and numbers, of few characters,
#   can lose all of their score. What is published with LongBench's code similarity, which calls
#   fuzz.ratio, depends on what else was installed.
# Fails if the two scores are no longer these.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
python=$folder/env/bin/python

cat > "$folder/score.py" <<'END'
import warnings

warnings.simplefilter("ignore")
from fuzzywuzzy import fuzz

first = ", ".join(str(number) for number in range(200))
second = ", ".join(str(number) for number in range(1, 201))
print(fuzz.ratio(first, second))
END

"$python" -m pip install --quiet --disable-pip-version-check fuzzywuzzy==0.18.0
alone=$("$python" "$folder/score.py")
"$python" -m pip install --quiet --disable-pip-version-check python-Levenshtein==0.27.1 Levenshtein==0.27.1 rapidfuzz==3.14.6
beside=$("$python" "$folder/score.py")

echo "fuzz.ratio, fuzzywuzzy alone: $alone, beside python-Levenshtein: $beside"
[ "$alone $beside" = "0 100" ] || { echo "expected 0 and 100: the finding has changed" >&2; exit 1; }
