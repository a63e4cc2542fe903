"""A passage read before is read again: does the model still find what comes next?

Long contexts change the loss of ordinary text little, and keeping the newest pages looks harmless
there. Here the next token stands in one place of the context, and nothing else tells it.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from quest_compile.eval.encode import Encoder
from quest_compile.eval.samples import COPY, Context, Group, Question
from quest_compile.text_files import read_text

PASSAGE = 192
# The model has to see some of the passage to know where it is.
NOT_SCORED = 16
# Where passages begin, in % of the context.
DEPTHS = (10, 50, 80)
_LEAST_LENGTH = PASSAGE + PASSAGE * 100 // (100 - DEPTHS[-1])
# Of each of three passages copy-multi reads two pieces, in turn.
_PIECE = PASSAGE // (2 * len(DEPTHS))


def copy_group(name: str, text: str, length: int, samples: int, encoder: Encoder) -> Group:
    """Contexts from all over ``text``, which with a second reading have ``length`` tokens.

    ``copy``: every context is asked for three passages, one at each depth; ``copy-multi``: once,
    for pieces of the three in turn.

    Raises:
        ValueError: the text is too short for ``length``, or ``length`` for the passages.
    """
    tokens = torch.tensor(encoder.plain(text))
    beginning = torch.tensor(encoder.beginning(), dtype=torch.int64)
    if length < _LEAST_LENGTH:
        raise ValueError(f"task {name} needs --lengths of at least {_LEAST_LENGTH}, got {length}")
    size = length - PASSAGE
    if len(tokens) < size:
        raise ValueError(f"the text has {len(tokens)} tokens, too few for --lengths {length}")
    starts = [depth * size // 100 for depth in DEPTHS]

    def make(number: int) -> Context:
        golden_ratio = 0.6180339887
        first = round(number * golden_ratio % 1 * (len(tokens) - size))
        context = torch.cat([beginning, tokens[first:]])[:size]
        if name == "copy":
            passages = [context[start : start + PASSAGE] for start in starts]
        else:
            pieces = [context[s + i : s + i + _PIECE] for i in (0, _PIECE) for s in starts]
            passages = [torch.cat(pieces)]
        return Context(context, tuple(map(_question, passages)))

    num_contexts = math.ceil(samples / len(starts)) if name == "copy" else samples
    return Group(name, length, num_contexts, length, make, COPY)


def _question(passage: torch.Tensor) -> Question:
    read = passage.tolist()
    return Question(tuple(read[:-1]), expected=tuple(read[NOT_SCORED:]))


def text_of(path: Path | None) -> str:
    """The file, or without one what Python's ``help()`` says about the language."""
    if path is not None:
        return read_text(path)
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))
