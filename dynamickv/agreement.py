"""How far one answer follows another: the same tokens, and the same words."""

from __future__ import annotations

from rouge import Rouge

from dynamickv.trace import Agreement, Run


def agreement(run: Run, yardstick: Run) -> Agreement:
    """How far `run` follows `yardstick`."""
    ours, theirs = run.token_ids, yardstick.token_ids
    longest = max(len(ours), len(theirs), 1)
    same = [a == b for a, b in zip(ours, theirs, strict=False)]
    return Agreement(
        first_divergence=None
        if ours == theirs
        else next((i for i, equal in enumerate(same) if not equal), len(same)),
        token_match=1.0 if ours == theirs else sum(same) / longest,
        rouge_l=rouge_l(run.answer, yardstick.answer),
    )


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L F-measure over words, 0 to 1; 1 for equal texts."""
    if prediction.split() == reference.split():
        return 1.0
    if not prediction.strip(" .\n") or not reference.strip(" .\n"):
        return 0.0
    return float(Rouge(metrics=["rouge-l"]).get_scores(prediction, reference)[0]["rouge-l"]["f"])
