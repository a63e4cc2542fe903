"""Quest as it is timed: settings by name, as a file of results has one method."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quest_compile.config import QuestConfig
    from quest_compile.ops import Selection, SummaryFormat

# As backend() takes them; results on record call other settings by these names, too.
QUEST: dict[str, dict[str, Any]] = {
    "quest": {},
    "quest-paper": {"preset": "paper"},
    "quest-minmax": {"summary": "minmax", "group_reduce": "sum"},
    "quest-sketch1": {"sketch_bits": 1},
}
# Measured where they are asked for.
MORE: dict[str, dict[str, Any]] = {"quest-top_p": {"top_p": 0.9}}

# Of QuestConfig, metadata of results.
FACTS = ("summary", "sketch_bits", "group_reduce", "budget", "page_size")


@dataclasses.dataclass(frozen=True)
class Setting:
    """How Quest decodes; the name is the method of the results.

    ``kind``: of ``QUEST`` or ``MORE``; ``budget``: tokens, or a share of the context.
    """

    kind: str = "quest"
    budget: int | float = 2048
    page_size: int = 16

    @property
    def name(self) -> str:
        page = "" if self.page_size == 16 else f"_page{self.page_size}"
        return f"{self.kind}_{self.budget}{page}"

    @property
    def config(self) -> QuestConfig:
        from quest_compile.config import QuestConfig

        options = {"budget": self.budget, "page_size": self.page_size}
        return QuestConfig.from_options((QUEST | MORE)[self.kind] | options)

    @property
    def page_format(self) -> SummaryFormat:
        return self.config.page_format

    def selection(self, max_seq_len: int) -> Selection:
        """On a cache of this length."""
        config = self.config
        return config.selection(config.layer_budget(0, max_seq_len))

    def facts(self) -> dict[str, Any]:
        """Metadata of its results."""
        return {name: getattr(self.config, name) for name in FACTS}

    def is_sparse(self, seq_len: int) -> bool:
        return is_sparse(self.config, seq_len)


def is_sparse(config: QuestConfig, seq_len: int) -> bool:
    """Does a query over ``seq_len`` tokens leave pages out?"""
    import torch

    from quest_compile.ops import reference

    selection, lengths = config.selection(config.layer_budget(0, seq_len)), torch.tensor([seq_len])
    return not bool(reference.fits_budget(lengths, seq_len, selection, config.page_size))
