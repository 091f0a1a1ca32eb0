"""How much of a reference's wording an answer has, and how much of itself it repeats. None of it measures truth."""

from collections.abc import Callable

Scorer = Callable[[str, str], dict[str, float]]


def scorer() -> Scorer:
    """(answer, reference) -> rougeL, chrf, repetition.

    rougeL: F-measure of ROUGE-L with stemming, 0 to 1 (Lin 2004). chrf: chrF2, 0 to 100 (Popović 2015), by sacrebleu's
    definition. Both by the reference packages.
    """
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.chrf import CHRF

    rouge, chrf = RougeScorer(["rougeL"], use_stemmer=True), CHRF()

    def score(answer: str, reference: str) -> dict[str, float]:
        return {
            "rougeL": round(rouge.score(reference, answer)["rougeL"].fmeasure, 6),
            "chrf": round(chrf.sentence_score(answer, [reference]).score, 4),
            "repetition": round(repetition(answer), 6),
        }

    return score


def repetition(text: str, n: int = 4) -> float:
    """Share of the word n-grams that stood in the text before: 0 for a text without loops, or shorter than n words."""
    words = text.lower().split()
    grams = list(zip(*(words[i:] for i in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
