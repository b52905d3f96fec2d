"""LongBench's metrics, equal to its official scorer to the last digit, oddities included.
 `METRICS[name](prediction, ground_truth, all_classes=None)` is a number in [0, 1]. ROUGE, Chinese
word segmentation and edit ratios come from the libraries in the extra `evaluate`, imported when a
metric first needs them.

Source: LongBench (Bai et al. 2024, arXiv:2308.14508), metrics.py and eval.py of its repository.
"""

from __future__ import annotations

import importlib
import logging
import re
import string
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

Metric = Callable[..., float]

WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")
"""Words, and single characters of scripts without spaces."""
RECURSION_LIMIT = 1000
"""Python's own, with which the official scorer runs."""
SHALLOW = 400
"""Characters of both texts below which the package `rouge` cannot recurse deeply anywhere."""

CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟"  # noqa: RUF001
    "〰〾〿–—‘’‛“”„‟…‧﹏."  # noqa: RUF001
)


def qa_f1(prediction: str, ground_truth: str, all_classes: Sequence[str] | None = None) -> float:
    """F1 over words, without case, punctuation and articles."""
    return _f1(_words(prediction), _words(ground_truth))


def qa_f1_zh(prediction: str, ground_truth: str, all_classes: Sequence[str] | None = None) -> float:
    """F1 over jieba's words, without case and punctuation."""
    return _f1(_chinese_words(prediction), _chinese_words(ground_truth))


def rouge_l(prediction: str, ground_truth: str, all_classes: Sequence[str] | None = None) -> float:
    """ROUGE-L F-measure as the package `rouge` computes it: over sentences that end in a full stop,
    words counted once.

    0 for an empty text and, as in the official scorer, where that package recurses too deeply (see
    `rouge_gives_up`). An answer that goes round in circles scores as one that says it once:
    `repetition` tells.
    """
    return _rouge(prediction, ground_truth) or 0.0


def rouge_gives_up(prediction: str, ground_truth: str, segmented: bool = False) -> bool:
    """Whether `rouge_l`, or with `segmented` `rouge_l_zh`, is 0 only because the package `rouge`
    recurses too deeply: sentences of some 990 words together, without a full stop."""
    texts = [prediction, ground_truth]
    if segmented:
        texts = [" ".join(_segmented(text)) for text in texts]
    return _rouge(*texts) is None


def rouge_l_zh(
    prediction: str, ground_truth: str, all_classes: Sequence[str] | None = None
) -> float:
    """`rouge_l` over jieba's words."""
    return rouge_l(" ".join(_segmented(prediction)), " ".join(_segmented(ground_truth)))


def classification(
    prediction: str, ground_truth: str, all_classes: Sequence[str] | None = None
) -> float:
    """One over the classes named in the prediction, if the right one is among them.

    Raises:
        ValueError: no classes given.
    """
    if not all_classes:
        raise ValueError("classification needs all_classes; give the names of the classes")
    named = [name for name in all_classes if name in prediction]
    # The official scorer removes from the list while it walks over it, which skips a name after
    # each removal; its numbers depend on that.
    for name in named:
        if name in ground_truth and name != ground_truth:
            named.remove(name)
    return 1.0 / len(named) if ground_truth in named else 0.0


def retrieval(
    prediction: str, ground_truth: str, all_classes: Sequence[str] | None = None
) -> float:
    """Share of the numbers in the prediction that are the right paragraph's."""
    return _share_of_numbers(prediction, _paragraph(r"Paragraph (\d+)", ground_truth))


def retrieval_zh(
    prediction: str, ground_truth: str, all_classes: Sequence[str] | None = None
) -> float:
    """`retrieval` for Chinese."""
    return _share_of_numbers(prediction, _paragraph(r"段落(\d+)", ground_truth))


def count(prediction: str, ground_truth: str, all_classes: Sequence[str] | None = None) -> float:
    """Share of the numbers in the prediction that are the right one."""
    return _share_of_numbers(prediction, str(ground_truth))


def code_similarity(
    prediction: str, ground_truth: str, all_classes: Sequence[str] | None = None
) -> float:
    """Edit ratio, in whole percents, of the prediction's first line that is code.

    The official scorer's fuzzywuzzy with python-Levenshtein beside it; alone, fuzzywuzzy computes
    another ratio (difflib's), which differs in about four of ten pairs.
    """
    lines = prediction.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(m in line for m in ("`", "#", "//"))), "")
    if not code or not ground_truth:  # fuzzywuzzy, which the official scorer uses, says so
        return float(code == ground_truth)
    return float(round(_library("rapidfuzz.fuzz").ratio(code, ground_truth)) / 100)


METRICS: dict[str, Metric] = {
    "qa_f1": qa_f1,
    "qa_f1_zh": qa_f1_zh,
    "rouge_l": rouge_l,
    "rouge_l_zh": rouge_l_zh,
    "classification": classification,
    "retrieval": retrieval,
    "retrieval_zh": retrieval_zh,
    "count": count,
    "code_similarity": code_similarity,
}


def contains_all(prediction: str, expected: Sequence[str]) -> float:
    """Share of the expected texts that the prediction contains, without case (RULER)."""
    return sum(text.lower() in prediction.lower() for text in expected) / len(expected)


def contains_any(prediction: str, expected: Sequence[str]) -> float:
    """1 if the prediction contains one of the expected texts, without case (RULER's questions)."""
    return float(any(text.lower() in prediction.lower() for text in expected))


def fuzzy(prediction: str, expected: Sequence[str]) -> float:
    """How much of each expected text the prediction holds at its best place, without case, in
    [0, 1]; the mean over the expected texts."""
    ratio = _library("rapidfuzz.fuzz").partial_ratio
    said = prediction.lower()
    # The shorter text slides over the longer one: an answer shorter than a fact must not win by it.
    padded = said.ljust(max(map(len, expected)))
    return float(sum(ratio(text.lower(), padded) for text in expected) / len(expected) / 100)


def repetition(text: str) -> float:
    """Share of a text's runs of four words that stood in it before, in [0, 1]; a Chinese or
    Japanese character counts as a word. 0 for fewer than five words."""
    words = WORDS.findall(text.lower())
    runs = list(zip(*(words[start:] for start in range(4)), strict=False))
    return 1 - len(set(runs)) / len(runs) if len(runs) > 1 else 0.0


def require_libraries() -> None:
    """Raise ValueError, with the remedy, unless the extra `evaluate` is installed."""
    for name in ("rouge", "jieba", "rapidfuzz.fuzz"):
        _library(name)


def _rouge(prediction: str, ground_truth: str) -> float | None:
    """ROUGE-L's F-measure; None where the package recurses too deeply."""
    scorer = _library("rouge").Rouge(metrics=["rouge-l"])

    def scored() -> float | None:
        try:
            return float(scorer.get_scores([prediction], [ground_truth], avg=True)["rouge-l"]["f"])
        except RecursionError:
            return None
        except (ValueError, AssertionError):
            return 0.0

    # The same text must not score here and give up there, by how deep its caller is.
    if len(prediction) + len(ground_truth) < SHALLOW:
        return scored()
    found: list[float | None] = []
    spare = sys.getrecursionlimit() - RECURSION_LIMIT
    thread = threading.Thread(target=lambda: found.append(_below(spare, scored)))
    thread.start()
    thread.join()
    return found[0]


def _below(calls: int, action: Callable[[], Any]) -> Any:
    """What an action gives after so many calls, which leaves it with fewer."""
    return action() if calls <= 0 else _below(calls - 1, action)


def _library(name: str) -> Any:
    try:
        library = importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise ValueError(
            f"this needs the package {package}; install it with pip install 'dynamickv[evaluate]'"
        ) from None
    if name == "jieba":
        library.setLogLevel(logging.WARNING)  # it reports on stderr how it loads its dictionary
    return library


def _f1(prediction: Sequence[str], ground_truth: Sequence[str]) -> float:
    same = (Counter(prediction) & Counter(ground_truth)).total()
    if same == 0:
        return 0.0
    precision, recall = same / len(prediction), same / len(ground_truth)
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> list[str]:
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _segmented(text: str) -> list[str]:
    return list(_library("jieba").cut(text, cut_all=False))


def _chinese_words(text: str) -> list[str]:
    dropped = string.punctuation + CHINESE_PUNCTUATION
    words = (
        "".join("".join(c for c in word.lower() if c not in dropped).split())
        for word in _segmented(text)
    )
    return [word for word in words if word]


def _paragraph(pattern: str, ground_truth: str) -> str:
    found = re.search(pattern, ground_truth)
    if found is None:
        raise ValueError(
            f"the ground truth {ground_truth!r} names no paragraph, such as 'Paragraph 3'"
        )
    return found[1]


def _share_of_numbers(prediction: str, right: str) -> float:
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(right) / len(numbers) if numbers else 0.0
