"""The settings of Quest decoding, in one frozen object."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any

from quest_compile.budgets import (
    DEFAULT_BUDGET,
    Budget,
    LayerBudget,
    LayerBudgets,
    TokensOrShare,
    check_budget,
)
from quest_compile.ops.limits import (
    GROUP_REDUCTIONS,
    PAGE_SIZES,
    SKETCH_BITS,
    SUMMARIES,
    num_pages_of,
)

INNER_COMPILERS = ("inductor", "aot_eager", "eager")

_INT_FIELDS = (
    "page_size",
    "num_dense_layers",
    "num_sink_pages",
    "num_recent_pages",
    "max_q_len",
    "sketch_bits",
    "audit",
)


@dataclasses.dataclass(frozen=True)
class QuestConfig:
    """Settings of Quest decoding (arXiv 2406.10774); hashable, compared by value.

    Args:
        budget: tokens a query attends at most, the open page included. Rounded down to whole pages.
            A float in (0, 1) is a share of the context, rounded up to whole pages, but never less
            than the pages that are always attended and one more. For layers of their own: a mapping
            from layers to such budgets, with "default" for the others (or else 2048), or a function
            of the layer; layers are counted as in the report, from 0.
        page_size: tokens per page, a multiple of 8 from 8 to 128.
        num_dense_layers: this many first layers of the model attend everything.
        num_sink_pages: the first pages with a live token are always attended.
        num_recent_pages: the last pages, open page included, are always attended (at least 1).
        max_q_len: up to so many queries at once (drafts to verify, short questions) are decoded as
            one is, each with pages of its own; more are a prefill and attend everything.
        group_reduce: how the query heads that share a KV head agree on pages: ``"sum"`` or
            ``"max"`` of their page scores, or ``"none"``: each selects for itself (the paper).
        summary: what is kept per page to score it; ``"minmax"``: minimum and maximum of its keys;
            ``"sketch"``: their mean, and what is left of each key in ``sketch_bits`` per channel.
        sketch_bits: 1 or 2, with ``summary="sketch"``.
        top_p: of the pages that are chosen by score only the best, until they have this share of
            the softmax over the page scores; ``budget`` caps them. 1: ``budget`` alone decides.
        audit: every so many calls a sparse layer computes full attention too and compares, for
            ``report()``; 0: never.
        inner: what compiles the rewritten graph: ``"inductor"``, ``"aot_eager"`` or ``"eager"``.
        strict: raise when a layer that should be sparse is not.
        inductor_options: Inductor settings, as in ``torch.compile(options=)``, for these graphs.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field has a value that is not supported, or the budget is too small.
    """

    budget: Budget = DEFAULT_BUDGET
    page_size: int = 16
    num_dense_layers: int = 2
    num_sink_pages: int = 1
    num_recent_pages: int = 2
    max_q_len: int = 8
    group_reduce: str = "sum"
    summary: str = "minmax"
    sketch_bits: int = 1
    top_p: float = 1.0
    audit: int = 0
    inner: str = "inductor"
    strict: bool = False
    inductor_options: Mapping[str, Any] | None = dataclasses.field(default=None, hash=False)

    def __post_init__(self) -> None:
        for name in _INT_FIELDS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__})")
        if not isinstance(self.strict, bool):
            raise TypeError(f"strict must be a bool, got {self.strict!r}")
        if isinstance(self.top_p, bool) or not isinstance(self.top_p, (int, float)):
            raise TypeError(f"top_p must be a number, got {self.top_p!r}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and up to 1, got {self.top_p}")
        if self.page_size not in PAGE_SIZES:
            raise ValueError(
                f"page_size must be a multiple of {PAGE_SIZES.step} from {PAGE_SIZES.start} to "
                f"{PAGE_SIZES.stop - 1}, got {self.page_size}"
            )
        _check_choice("group_reduce", self.group_reduce, tuple(GROUP_REDUCTIONS))
        _check_choice("summary", self.summary, SUMMARIES)
        _check_choice("sketch_bits", self.sketch_bits, SKETCH_BITS)
        _check_choice("inner", self.inner, INNER_COMPILERS)
        for name, lowest in (
            ("num_dense_layers", 0),
            ("num_sink_pages", 0),
            ("num_recent_pages", 1),
            ("max_q_len", 1),
            ("audit", 0),
        ):
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} must be at least {lowest}, got {getattr(self, name)}")
        self._check_budget()
        if self.inductor_options is not None:
            if not isinstance(self.inductor_options, Mapping):
                raise TypeError(
                    "inductor_options must be a mapping of Inductor settings, "
                    f"got {self.inductor_options!r}"
                )
            object.__setattr__(self, "inductor_options", dict(self.inductor_options))

    def _check_budget(self) -> None:
        budget = self.budget
        if isinstance(budget, Mapping):
            budget = LayerBudgets(budget)
            object.__setattr__(self, "budget", budget)
            for each in (*budget.values(), budget.of(-1)):
                self._check_room(each)
        elif not callable(budget):
            check_budget("budget", budget)
            self._check_room(budget)

    def _check_room(self, budget: TokensOrShare) -> None:
        num_forced = self.num_sink_pages + self.num_recent_pages
        if isinstance(budget, int) and budget // self.page_size < num_forced:
            raise ValueError(
                f"budget must hold the pages that are always attended: {self.num_sink_pages} sink "
                f"+ {self.num_recent_pages} recent pages of {self.page_size} tokens = "
                f"{num_forced * self.page_size} tokens, got budget={budget}"
            )

    def budget_of(self, layer: int) -> TokensOrShare:
        """Tokens, or a share of the context.

        Raises:
            TypeError, ValueError: ``budget`` is a function, and what it gives is no budget.
        """
        if isinstance(self.budget, LayerBudgets):
            return self.budget.of(layer)
        if isinstance(self.budget, (int, float)):
            return self.budget
        assert callable(self.budget)
        budget = self.budget(layer)
        check_budget(f"budget({layer})", budget)
        self._check_room(budget)
        return budget

    def layer_budget(self, layer: int, max_seq_len: int) -> LayerBudget:
        """What attention calls of this layer are given on a cache of this length."""
        budget = self.budget_of(layer)
        if isinstance(budget, int):
            pages, fraction = budget // self.page_size, 1.0
        else:
            capacity = num_pages_of(max_seq_len, self.page_size)
            smallest = self.num_sink_pages + self.num_recent_pages + 1
            pages, fraction = max(smallest, math.ceil(budget * capacity)), budget
        return LayerBudget(pages, pages * self.page_size, fraction)

    @property
    def page_budget(self) -> int:
        """Pages a query attends at most, open page included, where all layers have one budget in
        tokens.

        Raises:
            TypeError: it is a share, or one per layer: see ``layer_budget``.
        """
        if not isinstance(self.budget, int):
            raise TypeError(f"page_budget: budget={self.budget!r} differs by layer or context")
        return self.budget // self.page_size

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> QuestConfig:
        """Build from named options.

        Raises:
            ValueError: a name is unknown; the message lists the known ones.
        """
        return cls().replace(options)

    def replace(self, options: Mapping[str, Any]) -> QuestConfig:
        """This configuration with some fields changed; unknown names raise ValueError."""
        known = [field.name for field in dataclasses.fields(self)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            names = ", ".join(_with_hint(name, known) for name in unknown)
            raise ValueError(f"unknown option {names}; known: {', '.join(known)}")
        return dataclasses.replace(self, **options)

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values (JSON-able when inductor_options and budget are)."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if isinstance(self.budget, LayerBudgets):
            fields["budget"] = dict(self.budget)
        if self.inductor_options is not None:
            fields["inductor_options"] = dict(self.inductor_options)
        return fields


def _with_hint(name: str, known: list[str]) -> str:
    """The name, and the known one it may be a misspelling of."""
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"{name} (did you mean {close[0]!r}?)" if close else str(name)


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
