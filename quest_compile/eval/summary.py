"""What an evaluation found, in one sentence for somebody who reads no tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any

from quest_compile.eval.methods import DENSE, QUEST
from quest_compile.eval.records import Cell
from quest_compile.eval.results import LEAST_DENSE_SCORE, paired_scores
from quest_compile.eval.samples import PERPLEXITY
from quest_compile.eval.statistics import compare

# No verdict comes from these pooled answers: the margin does not matter.
_ANY_MARGIN = 1.0


@dataclasses.dataclass
class _Pooled:
    """All answers of one method, and what its sparse steps read; ``is_counted``: of every one."""

    dense: list[float] = dataclasses.field(default_factory=list)
    own: list[float] = dataclasses.field(default_factory=list)
    contexts: list[Hashable] = dataclasses.field(default_factory=list)
    steps: int = 0
    read: float = 0.0
    is_counted: bool = True


def sentence(lines: Mapping[Cell, dict[str, Any]]) -> str:
    """What was asked, how many answers were right with Quest and without, and whether that is more
    than chance (95 %) over all tasks together; empty where nothing was answered."""
    pooled: dict[tuple[str, Any], _Pooled] = {}
    tasks: dict[str, None] = {}
    for cell, line in lines.items():
        reference = lines.get(cell._replace(method=DENSE, budget=0))
        is_quest = cell.method.partition(":")[0] == QUEST
        if not is_quest or reference is None or line["kind"] == PERPLEXITY:
            continue
        tasks[cell.task] = None
        own = pooled.setdefault((cell.method, cell.budget), _Pooled())
        dense, scores, contexts = paired_scores([line], [reference], [cell.context], line["kind"])
        own.dense += dense
        own.own += scores
        own.contexts += [(cell.task, cell.length, context) for context in contexts]
        _add_read(own, line)
    if not pooled:
        return ""
    first = next(iter(pooled.values()))
    lengths = sorted({round(line["context_tokens"]) for line in lines.values()})
    tokens = f"{lengths[0]} to {lengths[-1]}" if len(lengths) > 1 else f"{lengths[0]}"
    failed = sum(first.dense) < LEAST_DENSE_SCORE * len(first.dense)
    nothing = " (too few to lose any)" if failed else ""
    parts = [_part(*key, own) for key, own in pooled.items()]
    return (
        f"Of {len(first.dense)} questions ({', '.join(tasks)}) about contexts of {tokens} tokens "
        f"the model answers {sum(first.dense):.4g} right without Quest{nothing}, "
        f"{'; '.join(parts)}."
    )


def _add_read(own: _Pooled, line: dict[str, Any]) -> None:
    activity = line["activity"]
    steps, read = activity["sparse_steps"], activity["tokens_read"]
    if not steps:
        steps, read = activity["steps"], line["context_tokens"]
    own.steps += steps
    own.is_counted &= read is not None
    own.read += steps * (read or 0) / line["context_tokens"]


def _part(method: str, budget: Any, own: _Pooled) -> str:
    name = " ".join(["Quest", *method.split(":")[1:], *([f"at budget {budget}"] if budget else [])])
    found = compare(own.dense, own.own, own.contexts, _ANY_MARGIN)
    chance = "as many" if found.lost == found.gained == 0 else "no more different than by chance"
    if found.high < 0:
        chance = "worse by more than chance"
    elif found.low > 0:
        chance = "better by more than chance"
    share = f"{min(1.0, own.read / own.steps):.0%}" if own.is_counted else "an uncounted part"
    return (
        f"{sum(own.own):.4g} with {name} ({chance}), whose sparse layers read {share} of the cache"
    )
