"""How close a written answer comes to its reference: one number in [0, 1] an example.

exact_match   equal but for white space
f1            words in common: 2 / (1/precision + 1/recall), over lower-case words without
              punctuation (Rajpurkar et al., SQuAD, 2016, but with articles kept)
rouge1, rouge2, rougeL   F1 over words, pairs of words, the longest common subsequence (package
              rouge-score; Lin, 2004)
bleu, chrf    sacrebleu's, of every sentence; over a set they are pooled (corpus BLEU), which is
              not the mean over sentences (Post, 2018, arXiv 1804.08771)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from plait.errors import PlaitError

Judge = Callable[[str, str], float]
"""`(prediction, reference) -> a number in [0, 1]`."""

_WORD = re.compile(r"\w+", re.UNICODE)


def same_text(prediction: str, answer: str) -> bool:
    """Equal but for white space at the ends and its kind and amount between."""
    return prediction.split() == answer.split()


def word_f1(prediction: str, answer: str) -> float:
    """F1 over the words of both, counted as often as they occur; 1 where neither has any."""
    mine, theirs = (Counter(_WORD.findall(text.lower())) for text in (prediction, answer))
    if not mine or not theirs:
        return float(mine == theirs)
    shared = (mine & theirs).total()
    return 2 * shared / (mine.total() + theirs.total())


def judge(metric: str) -> Judge:
    """The judge of that name; PlaitError, naming the extra, where its package is missing."""
    if metric == "exact_match":
        return lambda prediction, answer: float(same_text(prediction, answer))
    if metric == "f1":
        return word_f1
    if metric.startswith("rouge"):
        scorer = _rouge(metric)
        return lambda prediction, answer: scorer.score(answer, prediction)[metric].fmeasure
    sentence = _sacrebleu(metric, sentence=True)
    return lambda prediction, answer: sentence.sentence_score(prediction, [answer]).score / 100


TEXT_METRICS = ("exact_match", "f1", "rouge1", "rouge2", "rougeL", "bleu", "chrf")
POOLED = ("bleu", "chrf")
"""Metrics of which the set's value is not the mean of its examples'."""


def pooled(metric: str, predictions: Sequence[str], answers: Sequence[str]) -> float:
    """Corpus BLEU or chrF in [0, 1]."""
    return _sacrebleu(metric).corpus_score(list(predictions), [list(answers)]).score / 100


@cache
def _rouge(metric: str) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise PlaitError(
            f"metric {metric!r} needs rouge-score; run `pip install 'plait[eval]'`."
        ) from None
    return RougeScorer([metric], use_stemmer=False)


@cache
def _sacrebleu(metric: str, sentence: bool = False) -> Any:
    try:
        import sacrebleu
    except ImportError:
        raise PlaitError(
            f"metric {metric!r} needs sacrebleu; run `pip install 'plait[eval]'`."
        ) from None
    if metric == "chrf":
        return sacrebleu.CHRF()
    return sacrebleu.BLEU(effective_order=True) if sentence else sacrebleu.BLEU()
