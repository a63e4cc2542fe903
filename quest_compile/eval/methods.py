"""Methods by name, and one that decodes: dense, Quest compiled, or a baseline in plain torch."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from quest_compile import ops
from quest_compile.backend import backend
from quest_compile.budgets import LayerBudgets, TokensOrShare
from quest_compile.choices import NO_FORCED_PAGES
from quest_compile.config import QuestConfig
from quest_compile.eval.attention import NAME, EvalAttention
from quest_compile.eval.audited_mass import AuditedMass
from quest_compile.eval.baselines import KEEP

DENSE, QUEST, REFERENCE = "dense", "quest", "quest-reference"
# Settings of what is compiled, and how.
_NOT_OF_REFERENCE = {"audit", "inductor_options", "max_q_len", "strict"}


@dataclasses.dataclass(frozen=True)
class Method:
    """``name`` as given; ``kind``: "dense", "quest" or a baseline; ``settings`` of Quest.

    ``has_budget``: one of its own among the settings; such a method is measured once.
    """

    name: str
    kind: str
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def has_budget(self) -> bool:
        return "budget" in dict(self.settings)

    def budgets(self, budgets: Sequence[TokensOrShare]) -> Sequence[TokensOrShare]:
        """Those it is measured with; 0 for its own."""
        return (0,) if self.has_budget else budgets

    def check_layers(self, num_layers: int) -> None:
        """
        Raises:
            ValueError: its own budget names a layer that the model does not have.
        """
        budget = dict(self.settings).get("budget")
        layers = set(budget) - {"default"} if isinstance(budget, LayerBudgets) else set()
        if layers and max(layers) >= num_layers:
            raise ValueError(
                f"method {self.name}: there is no layer {max(layers)}, only 0 to {num_layers - 1}"
            )

    @property
    def needs_watching(self) -> bool:
        """Does it look at the attention inside the prefill?"""
        return self.kind in ("h2o", "snapkv")


def parse_method(name: str, config: QuestConfig) -> Method:
    """``"dense"``, ``"quest"``, ``"quest:preset=paper,page_size=32"`` or a baseline.

    A budget of its own is a share of the context (``budget=0.05``), or layers have their own:
    ``budget=2:64/3:0.05/default:128``.

    Raises:
        ValueError: an unknown name, or settings that Quest does not take.
    """
    kind, _, rest = name.partition(":")
    if kind not in (DENSE, QUEST, *KEEP) or (rest and kind not in (QUEST, REFERENCE)):
        known = ", ".join((DENSE, QUEST, *KEEP))
        raise ValueError(f"method must be one of {known}, or quest:setting=value,...; got {name!r}")
    settings = tuple(_parse_setting(name, part) for part in rest.split(",") if part)
    if kind not in (QUEST, REFERENCE):
        # They know neither sink nor recent pages: no budget has to hold them.
        settings = tuple(NO_FORCED_PAGES.items())
    if kind == REFERENCE and (unknown := set(dict(settings)) & _NOT_OF_REFERENCE):
        raise ValueError(f"method {name}: {REFERENCE} does not know {min(unknown)}")
    config.replace(dict(settings))
    return Method(name, kind, settings)


def _parse_setting(method: str, text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"method {method!r}: settings are name=value, got {text!r}")
    if name == "inner" or (name == "budget" and value.isdecimal()):
        raise ValueError(f"method {method!r}: {name} has an option of its own, --{name}")
    if name == "budget" and ":" in value:
        layers = [part.partition(":") for part in value.split("/")]
        try:
            return name, LayerBudgets({_number(k): _number(v) for k, _, v in layers})
        except TypeError as error:
            raise ValueError(f"method {method!r}: {error}") from error
    return name, _number(value)


def _number(value: str) -> Any:
    for convert in (int, float):
        try:
            return convert(value)
        except ValueError:
            pass
    return value


@dataclasses.dataclass
class Activity:
    """What one method did in some decode steps: the proof that it was sparse.

    ``sparse_steps``: steps with an attention call that left something out. Per query of those
    calls: ``tokens_read`` on average, ``most_tokens_read`` at most; None where they are not
    counted (operators on GPUs). ``mass_kept``: share of the dense attention weight in what was
    attended; of Quest with ``audit`` only, over the calls that were audited.
    """

    steps: int = 0
    sparse_steps: int = 0
    tokens_read: float | None = None
    most_tokens_read: int | None = None
    mass_kept: float | None = None


class Decoder:
    """Decodes with one method after the other over the same caches."""

    def __init__(self, model: Any, config: QuestConfig) -> None:
        self.model = model
        self.config = config
        self.attention = EvalAttention()
        self.attention.register()
        self._compiled: dict[QuestConfig, Callable[..., Any]] = {}
        self._activity = Activity()
        self._method = Method(DENSE, DENSE)

    def config_of(self, method: Method, budget: TokensOrShare) -> QuestConfig:
        own = dict(method.settings)
        return self.config.replace(own if method.has_budget else own | {"budget": budget})

    def begin(self, method: Method, budget: TokensOrShare, label: str) -> Callable[..., Any]:
        """The call for decode steps of this method; ``label`` seeds what is random."""
        config = self.config_of(method, budget) if method.kind != DENSE else self.config
        self._method, self._activity = method, Activity()
        self._audited = AuditedMass(_backend_of(config))
        if method.kind in (DENSE, QUEST):
            self.model.set_attn_implementation("sdpa")
            ops.reset_counters()
            call = self.model if method.kind == DENSE else self._compile(config)
        else:
            self.attention.begin_method(method.kind, config, zlib.crc32(label.encode()))
            self.model.set_attn_implementation(NAME)
            call = self.model
        return self._counted(call)

    def activity(self) -> Activity:
        """Since ``begin``."""
        found = self._activity
        if self._method.kind == QUEST:
            counted = ops.counters()
            if counted["sparse_rows"]:
                found.tokens_read = counted["tokens_attended"] / counted["sparse_rows"]
                found.most_tokens_read = counted["max_tokens_attended"]
            found.mass_kept = self._audited.kept()
        elif self.attention.kept.calls and self._method.kind != DENSE:
            kept = self.attention.kept
            found.tokens_read = kept.tokens / kept.calls
            found.most_tokens_read = kept.most
            found.mass_kept = sum(kept.masses) / kept.calls
        return found

    def implementation(self, method: Method) -> str:
        """What serves it, for the results."""
        if method.kind == DENSE:
            return "transformers sdpa, not compiled"
        if method.kind != QUEST:
            return "plain torch attention, not compiled"
        graphs = [g for c in self._compiled for g in _backend_of(c).report().graphs]
        inner = graphs[-1].inner if graphs else self.config.inner
        status = ops.native_status()
        kernels = status.info if status.loaded else "torch reference"
        if next(self.model.parameters()).device.type != "cpu":
            kernels = ops.cuda_kernels()
        return f"quest_compile.backend, inner {inner}, {kernels}"

    def report(self, method: Method, budget: TokensOrShare) -> str:
        return str(_backend_of(self.config_of(method, budget)).report())

    def _compile(self, config: QuestConfig) -> Callable[..., Any]:
        if config not in self._compiled:
            self._compiled[config] = torch.compile(self.model, backend=_backend_of(config))
        return self._compiled[config]

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def step(**inputs: Any) -> Any:
            before = self._num_sparse_calls()
            out = call(**inputs)
            self._activity.steps += 1
            self._activity.sparse_steps += self._num_sparse_calls() > before
            return out

        return step

    def _num_sparse_calls(self) -> int:
        if self._method.kind == QUEST:
            return ops.counters()["sparse_calls"]
        return self.attention.kept.calls if self._method.kind != DENSE else 0


def _backend_of(config: QuestConfig) -> Any:
    return backend(**config.as_dict())
