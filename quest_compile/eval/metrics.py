"""Scores of an answer between 0 and 1, against a list of references."""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Sequence


def string_match_all(text: str, answers: Sequence[str]) -> float:
    """The share of references that occur in the text, in any case (RULER)."""
    return sum(answer.lower() in text.lower() for answer in answers) / len(answers)


def string_match_part(text: str, answers: Sequence[str]) -> float:
    """1 if any reference occurs in the text (RULER's question answering)."""
    return float(any(answer.lower() in text.lower() for answer in answers))


def first_number(text: str, answers: Sequence[str]) -> float:
    """1 if the first number in the text is a reference (Quest's passkey protocol)."""
    found = re.search(r"\d+", text)
    return float(found is not None and found.group() in answers)


def qa_f1(text: str, answers: Sequence[str]) -> float:
    """The best F1 of words over the references (SQuAD, LongBench)."""
    return max(_f1(_words(text), _words(answer)) for answer in answers)


def rouge_l(text: str, answers: Sequence[str]) -> float:
    """The best F1 of the longest common subsequence of words over the references."""
    found = _words(text)
    return max(_subsequence_f1(found, _words(answer)) for answer in answers)


METRICS = {
    metric.__name__: metric
    for metric in (string_match_all, string_match_part, first_number, qa_f1, rouge_l)
}
# More text cannot lower these: decoding may stop once they are 1.
NEVER_FALLING = ("string_match_all", "string_match_part")

# How LongBench scores its English tasks; rows of other tasks are string_match_all.
OF_TASK = dict.fromkeys(
    ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa"),
    "qa_f1",
) | dict.fromkeys(("gov_report", "qmsum", "multi_news", "samsum"), "rouge_l")


def _words(text: str) -> list[str]:
    """Lower case, without punctuation and articles."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return [word for word in text.split() if word not in ("a", "an", "the")]


def _f1(found: list[str], wanted: list[str]) -> float:
    common = sum((collections.Counter(found) & collections.Counter(wanted)).values())
    return _harmonic_mean(common, len(found), len(wanted))


def _subsequence_f1(found: list[str], wanted: list[str]) -> float:
    longest = [0] * (len(wanted) + 1)
    for word in found:
        diagonal = 0
        for i, other in enumerate(wanted):
            above = longest[i + 1]
            longest[i + 1] = diagonal + 1 if word == other else max(above, longest[i])
            diagonal = above
    return _harmonic_mean(longest[-1], len(found), len(wanted))


def _harmonic_mean(common: int, num_found: int, num_wanted: int) -> float:
    return 2 * common / (num_found + num_wanted) if common else 0.0
