"""An answer decoded with Quest, and the pages that each of its steps read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from quest_compile import ops
from quest_compile.backend import QuestBackend
from quest_compile.passes import Treatment
from quest_compile.reading import Answer, Reading, answer


@dataclasses.dataclass(frozen=True)
class LookedStep:
    """The step that chose one token of the answer.

    ``text``: of the token. ``seq_len``: valid positions, that of the step's query included.
    ``pages``: layer -> int32 [heads that select, pages of the budget], -1 in unused slots.
    ``kept_mass``: layer -> share of full attention that those pages have; empty without audits.
    """

    text: str
    seq_len: int
    pages: dict[int | None, torch.Tensor]
    kept_mass: dict[int | None, float]


@dataclasses.dataclass
class Looked:
    """``dense``: what dense attention answered, where that was asked too."""

    reading: Reading
    quest: QuestBackend
    answer: Answer
    steps: list[LookedStep]
    counters: dict[str, int]
    dense: Answer | None = None


def look_at(
    reading: Reading,
    quest: QuestBackend,
    asked: list[int],
    max_new_tokens: int,
    on_token: Callable[[Answer, str], None] = lambda made, piece: None,
) -> Looked:
    """Ask with ``quest``, whose settings have ``record``; the counters are those of this call.

    Raises:
        ValueError: ``asked`` is empty, or no layer was sparse; with the report.
    """
    steps: list[LookedStep] = []
    masses = _KeptMass(quest)

    def keep(made: Answer, piece: str) -> None:
        on_token(made, piece)
        if not any(graph.count(Treatment.SPARSE) for graph in quest.report().graphs):
            raise ValueError(f"no layer was sparse, so there is nothing to see\n{quest.report()}")
        pages = {layer: of_layer[0, 0].cpu() for layer, of_layer in quest.recorded().items()}
        seq_len = reading.length + len(made.step_seconds)
        token = reading.tokenizer.decode(made.tokens[-1:])
        steps.append(LookedStep(token, seq_len, pages, masses.of_last_step))

    ops.reset_counters()
    step = torch.compile(reading.model, backend=quest)
    made = answer(
        step, reading, asked, max_new_tokens=max_new_tokens, on_token=keep, on_step=masses.read
    )
    return Looked(reading, quest, made, steps, ops.counters())


class _KeptMass:
    """Audits are sums over all steps: what a step added to them is its own.

    ``of_last_step``: layer -> kept mass.
    """

    def __init__(self, quest: QuestBackend) -> None:
        self._quest = quest
        self._sums: dict[tuple[int, int | None], tuple[float, int]] = {}
        self.of_last_step: dict[int | None, float] = {}

    def read(self) -> None:
        self.of_last_step = {}
        for number, graph in enumerate(self._quest.report().graphs):
            for row, audit in graph.audited_rows():
                if audit is None or audit.kept_mass is None:
                    continue
                mass, queries = self._sums.get((number, row.layer), (0.0, 0))
                now = (audit.kept_mass * audit.queries, audit.queries)
                self._sums[number, row.layer] = now
                if now[1] > queries:
                    self.of_last_step[row.layer] = (now[0] - mass) / (now[1] - queries)
