"""Record recall: the synthetic task behind the accuracy tests.

A context is filler with records `# k1 k2 v1 v2` at random places; a question `? k1 k2` must be
answered with the record's `v1 v2`. Finding the record means matching two keys anywhere in the
context, so an attention that drops the wrong pages answers wrongly. A small share of stray key and
value symbols in the filler keeps a single matching symbol from being enough.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

VOCAB_SIZE = 512
BOS = 0
RECORD = 1
QUESTION = 2
KEYS = range(16, 80)
VALUES = range(80, 144)
FILLER = range(144, VOCAB_SIZE)

RECORD_LEN = 5
QUESTION_LEN = 3
ANSWER_LEN = 2
# At most one record starts and ends in each slot of 8 positions after the BOS.
SLOT_LEN = 8


@dataclass(frozen=True, eq=False)
class RecallContext:
    """One context and questions about it, each to be asked right after the context.

    Attributes:
        tokens: int64 [T], BOS first.
        questions: int64 [Q, 3], rows `? k1 k2`.
        answers: int64 [Q, 2], rows `v1 v2`.
    """

    tokens: Tensor
    questions: Tensor
    answers: Tensor


def max_records(num_tokens: int) -> int:
    """The number of records that fit into a context of `num_tokens` tokens."""
    return min((num_tokens - 1) // SLOT_LEN, len(KEYS) ** 2)


def make_context(
    num_tokens: int, num_records: int, num_questions: int, *, seed: int, stray: float = 0.02
) -> RecallContext:
    """Draws a context; the same arguments give the same context.

    Args:
        num_tokens: length T of the context, BOS included.
        num_records: records in it, no two with the same pair of keys.
        num_questions: questions Q, about different records.
        seed: of the random numbers, 0 <= seed < 2**63.
        stray: probability that a filler position holds a random key or value symbol.

    Raises:
        ValueError: for counts that do not fit each other, a bad seed or a bad probability.
    """
    if num_tokens < 1 + SLOT_LEN:
        raise ValueError(
            f"num_tokens must be at least {1 + SLOT_LEN}, the length of a context with one record, "
            f"got {num_tokens}"
        )
    if not 1 <= num_records <= max_records(num_tokens):
        raise ValueError(
            f"num_records must be between 1 and {max_records(num_tokens)} for num_tokens="
            f"{num_tokens} (one record per {SLOT_LEN} tokens), got {num_records}"
        )
    if not 1 <= num_questions <= num_records:
        raise ValueError(
            f"num_questions must be between 1 and num_records={num_records}, got {num_questions}"
        )
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be between 0 and 2**63 - 1, got {seed}")
    if not 0.0 <= stray <= 1.0:
        raise ValueError(f"stray must be a probability between 0 and 1, got {stray}")

    generator = torch.Generator().manual_seed(seed)

    def draw(symbols: range, *shape: int) -> Tensor:
        return torch.randint(symbols.start, symbols.stop, shape, generator=generator)

    tokens = draw(FILLER, num_tokens)
    is_stray = torch.rand(num_tokens, generator=generator) < stray
    tokens = torch.where(is_stray, draw(range(KEYS.start, VALUES.stop), num_tokens), tokens)
    tokens[0] = BOS

    slots = torch.randperm((num_tokens - 1) // SLOT_LEN, generator=generator)[:num_records]
    starts = 1 + slots * SLOT_LEN + draw(range(SLOT_LEN - RECORD_LEN + 1), num_records)
    key_pairs = torch.randperm(len(KEYS) ** 2, generator=generator)[:num_records]
    keys = KEYS.start + torch.stack([key_pairs // len(KEYS), key_pairs % len(KEYS)], dim=1)
    values = draw(VALUES, num_records, ANSWER_LEN)
    records = torch.cat([torch.full((num_records, 1), RECORD), keys, values], dim=1)
    tokens[starts[:, None] + torch.arange(RECORD_LEN)] = records

    asked = torch.randperm(num_records, generator=generator)[:num_questions]
    questions = torch.cat([torch.full((num_questions, 1), QUESTION), keys[asked]], dim=1)
    return RecallContext(tokens=tokens, questions=questions, answers=values[asked])
