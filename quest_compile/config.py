"""The settings of Quest decoding, in one frozen object."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from typing_extensions import TypedDict

from quest_compile.budgets import (
    DEFAULT_BUDGET,
    Budget,
    LayerBudget,
    LayerBudgets,
    TokensOrShare,
    check_budget,
)
from quest_compile.choices import INNER_COMPILERS, LINEAR, PREFILLS, PRESETS
from quest_compile.ops import Selection, SummaryFormat, require

# Fields that say which pages are selected, beside the budget.
_OF_SELECTION = tuple(name for name in Selection.names() if not name.startswith("budget"))
_Function = TypeVar("_Function", bound=Callable[..., Any])


class QuestSettings(TypedDict, total=False):
    """The fields of :class:`QuestConfig` as keywords; ``preset``: the name of other defaults."""

    preset: str | None
    budget: Budget
    page_size: int
    num_dense_layers: int
    num_sink_pages: int
    num_recent_pages: int
    max_q_len: int
    group_reduce: str
    summary: str
    sketch_bits: int
    top_p: float
    prefill: str
    audit: int
    record: bool
    linear: str
    inner: str
    strict: bool
    inductor_options: Mapping[str, Any] | None


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
        max_q_len: up to so many queries at once (drafts to verify, short questions, the end of a
            prompt in chunks) are decoded as one is, each with pages of its own; more are a prefill
            and attend everything.
        group_reduce: how the query heads that share a KV head agree on pages: ``"softmax"``: by
            the sum of each head's softmax over the page scores; ``"none"``: each selects for itself
            (the paper); ``"sum"``: by the bound of the summed queries (``"minmax"`` only).
        summary: what is kept per page to score it; ``"minmax"``: minimum and maximum of its keys;
            ``"sketch"``: their mean, and what is left of each key in ``sketch_bits`` per channel.
        sketch_bits: 1 or 2, with ``summary="sketch"``.
        top_p: of the pages that are chosen by score only the best, until they have this share of
            the softmax over the page scores; ``budget`` caps them. 1: ``budget`` alone decides.
        prefill: what runs calls of more queries, which attend everything: ``"sdpa"``: torch;
            ``"dense"``: our kernel, where the device has one; ``"auto"``: the one that is known to
            be faster for this CPU and dtype. In ``generate`` only ``"dense"`` counts: it sends
            prompts through the compiled model in chunks.
        audit: every so many calls a sparse layer computes full attention too and compares, for
            ``report()``; 0: never.
        record: keep which pages the sparse layers attended, for ``recorded()``; the parts of their
            operator run one by one then, with the same results.
        linear: ``"auto"``: linear layers of up to 8 rows, with plain weights on a CPU, run as
            ``quest::linear_decode``; ``"torch"``: as they are.
        inner: what compiles the rewritten graph: ``"inductor"``, ``"aot_eager"`` or ``"eager"``.
        strict: raise when a layer that should be sparse is not, or runs uncompiled.
        inductor_options: Inductor settings, as in ``torch.compile(options=)``, for these graphs.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field has a value that is not supported, or the budget is too small.
    """

    budget: Budget = DEFAULT_BUDGET
    page_size: int = SummaryFormat.page_size
    num_dense_layers: int = 2
    num_sink_pages: int = Selection.num_sink_pages
    num_recent_pages: int = Selection.num_recent_pages
    max_q_len: int = 8
    group_reduce: str = Selection.group_reduce
    summary: str = SummaryFormat.summary
    sketch_bits: int = SummaryFormat.sketch_bits
    top_p: float = Selection.top_p
    prefill: str = "auto"
    audit: int = 0
    record: bool = False
    linear: str = "auto"
    inner: str = "inductor"
    strict: bool = False
    inductor_options: Mapping[str, Any] | None = dataclasses.field(default=None, hash=False)

    def __post_init__(self) -> None:
        require.integer("num_dense_layers", self.num_dense_layers, 0)
        require.integer("max_q_len", self.max_q_len, 1)
        require.integer("audit", self.audit, 0)
        require.choice("linear", self.linear, LINEAR)
        require.choice("inner", self.inner, INNER_COMPILERS)
        require.choice("prefill", self.prefill, PREFILLS)
        for name in ("record", "strict"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{name}: expected a bool, got {value!r}")
        if isinstance(self.budget, Mapping):
            object.__setattr__(self, "budget", LayerBudgets(self.budget))
        for budget in self._known_budgets():
            check_budget("budget", budget)
            self._check_room(budget)
        if self.inductor_options is not None:
            if not isinstance(self.inductor_options, Mapping):
                raise TypeError(
                    "inductor_options: expected a mapping of Inductor settings, "
                    f"got {self.inductor_options!r}"
                )
            object.__setattr__(self, "inductor_options", dict(self.inductor_options))

    def _known_budgets(self) -> tuple[Any, ...]:
        """All there are, unless a function gives them."""
        if isinstance(self.budget, LayerBudgets):
            return (*self.budget.values(), self.budget.of(-1))
        return (DEFAULT_BUDGET,) if callable(self.budget) else (self.budget,)

    def _check_room(self, budget: TokensOrShare) -> None:
        """A share always has room."""
        page_format = self.page_format
        given = budget if isinstance(budget, int) else sys.maxsize
        self.selection(LayerBudget(0, given)).check_format(page_format)

    @property
    def page_format(self) -> SummaryFormat:
        return SummaryFormat(**{name: getattr(self, name) for name in SummaryFormat.names()})

    def selection(self, budget: LayerBudget) -> Selection:
        """Of the queries of a layer with this budget."""
        settings = {name: getattr(self, name) for name in _OF_SELECTION}
        return Selection(budget=budget.tokens, budget_fraction=budget.fraction, **settings)

    @property
    def tells_layers_apart(self) -> bool:
        """Do ``num_dense_layers`` or ``budget`` treat one layer differently from another?"""
        return self.num_dense_layers > 0 or not isinstance(self.budget, (int, float))

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
        return self._layer_budget(self.budget_of(layer), max_seq_len)

    def _layer_budget(self, budget: TokensOrShare, max_seq_len: int) -> LayerBudget:
        if isinstance(budget, int):
            pages, fraction = budget // self.page_size, 1.0
        else:
            capacity = self.page_format.num_pages(max_seq_len)
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
        """This configuration with some fields changed; unknown names raise ValueError.

        ``preset``: its fields change, but for those that are named as well.
        """
        options = dict(options)
        if (preset := options.pop("preset", None)) is not None:
            require.choice("preset", preset, tuple(PRESETS))
            options = PRESETS[preset] | options
        known = [field.name for field in dataclasses.fields(self)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            names = ", ".join(_with_hint(name, known) for name in unknown)
            raise ValueError(f"unknown option {names}; known: preset, {', '.join(known)}")
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


def takes_settings(function: _Function) -> _Function:
    """``help()`` shows the settings and their defaults in the place of ``**settings``."""
    own = inspect.signature(function)
    kept = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    fields = inspect.signature(QuestConfig).parameters.values()
    preset = inspect.Parameter("preset", inspect.Parameter.KEYWORD_ONLY, default=None)
    settings = [preset, *(p.replace(kind=p.KEYWORD_ONLY) for p in fields)]
    function.__signature__ = own.replace(parameters=[*kept, *settings])  # type: ignore[attr-defined]
    return function
