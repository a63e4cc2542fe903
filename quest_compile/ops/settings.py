"""The settings of the operators: how pages are selected, and what is kept of them.

Each value is checked when it is made, here and nowhere else in Python; schemas are written from its
fields, in their order.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from typing_extensions import Self, TypedDict

from quest_compile.ops import require

PAGE_SIZES = range(8, 129, 8)
SUMMARIES = ("minmax", "sketch")
SUMMED_SUMMARIES = ("minmax",)  # the score of the summed queries of a group stands for it
SKETCH_BITS = (1, 2)
GROUP_REDUCTIONS = ("softmax", "none", "sum")


class _Settings:
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field]]

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(cls.__dataclass_fields__)

    @classmethod
    def schema(cls, *names: str) -> str:
        """As in the schema of an operator: all fields, or those named."""
        fields = [cls.__dataclass_fields__[name] for name in names or cls.names()]
        return ", ".join(f"{field.type} {field.name}{_default_of(field)}" for field in fields)

    @classmethod
    def take(cls, settings: dict[str, Any]) -> Self:
        """Of keyword settings; takes its own out of them."""
        return cls(**{name: settings.pop(name) for name in cls.names() if name in settings})

    def as_kwargs(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.names()}


def _default_of(field: dataclasses.Field) -> str:
    if field.default is dataclasses.MISSING:
        return ""
    return f'="{field.default}"' if isinstance(field.default, str) else f"={field.default}"


@dataclasses.dataclass(frozen=True)
class SummaryFormat(_Settings):
    """What is kept of the keys of a page to score it.

    page_size: positions per page, a multiple of 8 from 8 to 128.
    summary: "minmax": minimum and maximum of the keys (the paper's); "sketch": their mean, and what
        is left of each key in sketch_bits per channel.
    sketch_bits: 1 or 2, with summary="sketch".
    """

    page_size: int = 16
    summary: str = "sketch"
    sketch_bits: int = 2

    def __post_init__(self) -> None:
        sizes = PAGE_SIZES
        require.integer("page_size", self.page_size, 1)
        for is_met in (
            self.page_size >= sizes.start,
            self.page_size < sizes.stop,
            self.page_size % sizes.step == 0,
        ):
            require.that(
                is_met,
                lambda: (
                    f"page_size: expected a multiple of {sizes.step} from {sizes.start} to "
                    f"{sizes.stop - 1}, got {self.page_size}"
                ),
            )
        require.choice("summary", self.summary, SUMMARIES)
        require.choice("sketch_bits", self.sketch_bits, SKETCH_BITS)

    def __str__(self) -> str:
        planes = f" of {self.sketch_bits} bit{'s' * (self.sketch_bits > 1)}"
        return (
            f"page_size {self.page_size}, "
            f"summary {self.summary}{planes if self.summary == 'sketch' else ''}"
        )

    def num_pages(self, max_seq_len: int) -> int:
        """Of a cache of this many positions; the last page may be cut short by its end."""
        return (max_seq_len + self.page_size - 1) // self.page_size


@dataclasses.dataclass(frozen=True)
class Selection(_Settings):
    """Which pages a query attends.

    budget: tokens that a query attends at most, the open page included; rounded down to pages. A
        row of at most that many tokens gets the result of dense_decode, bit for bit.
    num_sink_pages: the first pages with a position to attend are selected.
    num_recent_pages: so are the last pages in use, the open page being the last of them.
    group_reduce: over the query heads that share a KV head: "softmax": the sum of each head's
        softmax over the scores of the pages; "none": every query head selects for itself (the
        paper); "sum": the bound of the summed queries, with summary="minmax" only.
    budget_fraction: above 0 and up to 1: a row attends at most this share of its pages in use,
        rounded up, but no less than the sinks, the recents and one more page. A row that has no
        more pages than that is dense as well.
    top_p: above 0 and below 1: of the pages that are not sinks or recents only the best, until
        those have this share of the softmax over the page scores; budget caps them. 1: budget
        alone decides.
    """

    budget: int
    num_sink_pages: int = 1
    num_recent_pages: int = 2
    group_reduce: str = "softmax"
    budget_fraction: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        require.integer("budget", self.budget, 1)
        check_forced_pages(self.num_sink_pages, self.num_recent_pages)
        require.choice("group_reduce", self.group_reduce, GROUP_REDUCTIONS)
        require.share("budget_fraction", self.budget_fraction)
        require.share("top_p", self.top_p)

    def check_format(self, page_format: SummaryFormat) -> None:
        """
        Raises:
            ValueError: it does not go with pages of this format.
        """
        check_reduction(self.group_reduce, page_format.summary)
        check_room("budget", self.budget // page_format.page_size, self)

    def __str__(self) -> str:
        """Without the budget."""
        names = ("group_reduce", "num_sink_pages", "num_recent_pages")
        shown = [f"{name} {getattr(self, name)}" for name in names]
        return ", ".join([*shown, f"top_p {self.top_p:g}"] if self.top_p < 1 else shown)

    def in_pages(self, page_size: int) -> dict[str, Any]:
        """As select_pages takes it."""
        chosen = {name: getattr(self, name) for name in ChoiceSettings.__annotations__}
        return {"page_budget": self.budget // page_size, "page_size": page_size} | chosen

    @property
    def num_forced_pages(self) -> int:
        return self.num_sink_pages + self.num_recent_pages


def check_forced_pages(num_sink_pages: int, num_recent_pages: int) -> None:
    require.integer("num_sink_pages", num_sink_pages, 0)
    require.integer("num_recent_pages", num_recent_pages, 1)


def check_reduction(group_reduce: str, summary: str) -> None:
    require.choice("group_reduce", group_reduce, GROUP_REDUCTIONS)
    if group_reduce == "sum" and summary not in SUMMED_SUMMARIES:
        raise ValueError(
            f"group_reduce: expected 'softmax' or 'none' with summary='{summary}', got 'sum'"
        )


def check_room(name: str, num_pages: int, selection: Selection) -> None:
    """``num_pages``, which follow from the argument ``name``, hold the pages always attended."""
    require.that(
        num_pages >= selection.num_forced_pages,
        lambda: (
            f"{name}: expected room for {selection.num_sink_pages} sink and "
            f"{selection.num_recent_pages} recent pages, got {num_pages} pages"
        ),
    )


class FormatSettings(TypedDict, total=False):
    """Keyword settings of :class:`SummaryFormat`."""

    page_size: int
    summary: str
    sketch_bits: int


class ChoiceSettings(TypedDict, total=False):
    """Those of :class:`Selection` that choose pages by their scores, within a budget."""

    num_sink_pages: int
    num_recent_pages: int
    budget_fraction: float
    top_p: float


class SparseSettings(FormatSettings, ChoiceSettings, total=False):
    """Keyword settings of :class:`Selection` and :class:`SummaryFormat`, and the factor of
    query.key, 1 / sqrt(head_dim) by default."""

    budget: int
    group_reduce: str
    scale: float | None


def take_sparse(settings: dict[str, Any]) -> tuple[Selection, SummaryFormat]:
    """Of keyword settings; takes them out."""
    if "budget" not in settings:
        raise TypeError("budget: expected the tokens that a query attends at most, got nothing")
    selection, page_format = Selection.take(settings), SummaryFormat.take(settings)
    selection.check_format(page_format)
    return selection, page_format
