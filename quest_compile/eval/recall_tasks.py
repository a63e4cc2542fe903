"""Record recall, the task of the model shipped here, which has no tokenizer."""

from __future__ import annotations

from quest_compile import recall
from quest_compile.eval.samples import AGREEMENT, RECALL, Context, Group, Question
from quest_compile.recall.task import ANSWER_LEN, QUESTION_LEN, VOCAB_SIZE, max_records

_MOST_QUESTIONS = 64
_CONTINUATION = 4


def recall_group(name: str, length: int, samples: int, vocab_size: int, seed: int) -> Group:
    """Record recall with so many records as the name says; ``length`` is that of the context.

    Raises:
        ValueError: another model, or records that do not fit.
    """
    if vocab_size != VOCAB_SIZE:
        raise ValueError(
            f"task {name} is for the recall model ({VOCAB_SIZE} symbols); this model has "
            f"{vocab_size}"
        )
    suffix = name.removeprefix(RECALL)
    if not suffix.isdecimal() or not 1 <= int(suffix) <= max_records(length):
        raise ValueError(
            f"task {name} must be {RECALL}N with N records from 1 to {max_records(length)} to fit "
            f"into --lengths {length}"
        )
    num_records = int(suffix)
    num_questions = min(num_records, _MOST_QUESTIONS)

    def make(number: int) -> Context:
        made = recall.make_context(length, num_records, num_questions, seed=seed * 10**6 + number)
        questions = tuple(
            Question(tuple(asked), expected=tuple(answer), max_new_tokens=ANSWER_LEN)
            for asked, answer in zip(made.questions.tolist(), made.answers.tolist())
        )
        return Context(made.tokens, questions)

    most = length + QUESTION_LEN + ANSWER_LEN - 1
    return Group(name, length, -(-samples // num_questions), most, make)


def recall_agreement(length: int, samples: int, seed: int) -> Group:
    """Agreement without a tokenizer: questions about records, continued for some tokens."""
    group = recall_group(f"{RECALL}16", length, samples, VOCAB_SIZE, seed)

    def make(number: int) -> Context:
        made = group.make(number)
        return Context(
            made.tokens,
            tuple(Question(q.tokens, max_new_tokens=_CONTINUATION) for q in made.questions),
        )

    return Group(
        AGREEMENT, length, group.num_contexts, group.max_seq_len + _CONTINUATION, make, AGREEMENT
    )
