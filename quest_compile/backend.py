"""The torch.compile backend: rewrite the graph, compile it, thread the page summaries through."""

from __future__ import annotations

import collections
import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from typing_extensions import Unpack

from quest_compile import ops
from quest_compile.added_inputs import AddedInputs
from quest_compile.audits import GraphAudits
from quest_compile.compiled_functions import is_given_up
from quest_compile.config import QuestConfig, QuestSettings, takes_settings
from quest_compile.cuda_graphs import cuda_graph_options, wants_cuda_graph, with_own_outputs
from quest_compile.graph_report import GraphReport
from quest_compile.inner import compile_rewrite, has_cpu_tensor, inner_compiler, mode_options
from quest_compile.passes import Reason, Treatment, run_passes
from quest_compile.report import Report, report_rewrite
from quest_compile.report_notes import unknown_layers
from quest_compile.step_state import with_state


class QuestStrictError(RuntimeError):
    """``strict=True`` and an attention call that should be sparse is not."""


class QuestBackend:
    """A torch.compile backend with fixed settings; made by :func:`backend`, compared by them."""

    def __init__(self, config: QuestConfig) -> None:
        self.config = config
        self._graphs: list[GraphReport] = []
        self._dense_generations: collections.Counter[str] = collections.Counter()

    def __call__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Callable[..., Any]:
        """Compile a Dynamo graph; ``mode`` and ``options`` as torch.compile hands them over.

        Raises:
            ValueError: an unknown option or mode.
            QuestStrictError: see ``strict``.
        """
        config = self.config.replace(options) if options else self.config
        patches = mode_options(mode) | dict(config.inductor_options or {})
        rewrite = run_passes(gm, config=config)
        if rewrite.gm is not gm and has_cpu_tensor(example_inputs):
            ops.warn_if_missing()
        inner = inner_compiler(config.inner, example_inputs)
        is_graphed = wants_cuda_graph(rewrite.decisions, inner, mode, patches)
        if is_graphed:
            patches |= cuda_graph_options()
        audits = GraphAudits(rewrite.audit_values())
        recordings = AddedInputs(rewrite.recording_values(), fill=-1)
        graph = report_rewrite(rewrite, config, mode, inner, patches, audits, recordings)
        self._graphs.append(graph)
        if config.strict:
            _check_rows(graph)
        compiled = compile_rewrite(rewrite, example_inputs, inner, patches)
        if is_graphed:
            compiled = with_own_outputs(compiled)
        # What is appended inside stands behind.
        if config.record:
            compiled = recordings.append_to(compiled)
        if rewrite.audits:
            compiled = audits.append_to(compiled)
        if rewrite.summaries:
            cache_indices = [(s.cache_index, s.value_cache_index) for s in rewrite.summaries]
            is_sparse = graph.count(Treatment.SPARSE) > 0
            compiled = with_state(compiled, cache_indices, config.page_format, is_sparse)
        return self._checked_when_called_again(compiled, graph) if config.strict else compiled

    def _checked_when_called_again(
        self, compiled: Callable[..., Any], graph: GraphReport
    ) -> Callable[..., Any]:
        """A graph may be one layer of a model: by its second call the others were compiled too.
        Later its function may be given up."""
        calls = itertools.count()

        def step(*args: Any) -> Any:
            if next(calls) == 1 or is_given_up(graph.function):
                _check_whole(self._graphs, graph)
            return compiled(*args)

        return step

    def report(self) -> Report:
        """What became of the attention calls of every graph compiled so far."""
        with _backends_lock:
            others = () if self._graphs else [repr(b) for b in _backends.values() if b._graphs]
        return Report(self._graphs, others, self._dense_generations)

    def note_dense_generation(self, cause: str) -> None:
        """A ``generate`` call that decodes densely, for the report."""
        self._dense_generations[cause] += 1

    def recorded(self) -> dict[int | None, torch.Tensor]:
        """Of the last step with ``record=True``: the pages that each sparse layer attended.

        A step may run several graphs, each for some layers; a step of another batch size or cache
        length runs others.

        Returns:
            Layer, as in the report (None: not known), -> int32 [max_q_len, batch, num_kv_heads,
            pages of the budget], on the device (num_q_heads with ``group_reduce="none"``):
            ascending, -1 in unused slots and for queries that there were not. Copies.

        Raises:
            ValueError: no step has run with ``record=True``, or the last one had no sparse layer.
        """
        ran = [(g.recordings, g) for g in self._graphs if g.recordings and g.recordings.last_call]
        found: dict[int | None, torch.Tensor] = {}
        seen: set[int | None] = set()
        for recordings, graph in sorted(ran, key=lambda pair: -pair[0].last_call):
            if seen.intersection(row.layer for row in graph.rows):
                # A layer that has run again since: a step before the last one.
                break
            seen.update(row.layer for row in graph.rows)
            layers = [row.layer for row in graph.rows if row.treatment is Treatment.SPARSE]
            if layers.count(None) > 1:
                raise ValueError("recorded(): nothing tells the sparse layers of a graph apart")
            found |= zip(layers, (x.clone() for x in recordings.values()), strict=True)
        if not found:
            which = "the last step had no sparse layer" if seen else "no attention has run yet"
            raise ValueError(f"recorded(): {which} with record=True")
        return dict(sorted(found.items(), key=lambda pair: (pair[0] is None, pair[0])))

    def reset(self) -> None:
        """Forget the report; called by ``torch._dynamo.reset()``."""
        self._graphs.clear()
        self._dense_generations.clear()
        if torch.cuda.is_available():
            from torch._inductor.cudagraph_trees import reset_cudagraph_trees

            reset_cudagraph_trees()

    def get_compiler_config(self) -> dict[str, Any]:
        """Inductor's settings as these graphs see them (asked for by torch.compile)."""
        from torch._inductor.compile_fx import get_patched_config_dict

        return get_patched_config_dict(config_patches=dict(self.config.inductor_options or {}))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, QuestBackend) and self.config == other.config

    def __hash__(self) -> int:
        return hash(self.config)

    def __deepcopy__(self, memo: dict) -> QuestBackend:
        return self

    def __reduce__(self) -> tuple:
        return (_backend_of, (self.config.as_dict(),))

    def changed_settings(self) -> dict[str, Any]:
        """Those that are not the default."""
        defaults = QuestConfig().as_dict()
        return {k: v for k, v in self.config.as_dict().items() if v != defaults[k]}

    def __repr__(self) -> str:
        changed = (f"{name}={value!r}" for name, value in self.changed_settings().items())
        return f"quest_compile.backend({', '.join(changed)})"


def _check_rows(graph: GraphReport) -> None:
    """Every decode call behind the dense layers must be sparse; a prefill graph is fine."""
    expected = (
        Reason.SPARSE,
        Reason.DENSE_LAYER,
        Reason.PREFILL,
        Reason.PREFILL_ALONE,
        Reason.CACHE_CREATED_IN_GRAPH,
    )
    wrong = [row for row in graph.rows if row.reason not in expected]
    if wrong:
        found = f"{len(wrong)} of {len(graph.rows)} attention calls are not as expected"
        raise QuestStrictError(f"strict=True: {found}\n{Report([graph])}")


def _check_whole(graphs: list[GraphReport], graph: GraphReport) -> None:
    """Some layer must be sparse once one is decoded, and none may run uncompiled.

    ``graph`` is the one that is called again.
    """
    report = Report(graphs)
    why = ""
    if not report.rows:
        why = "nothing to replace"
    elif graph.is_decode and not report.count(Treatment.SPARSE):
        why = "no layer is sparse"
    elif said := unknown_layers(graphs):
        why = said
    elif is_given_up(graph.function):
        why = f"{graph.function.name} has more layers or shapes than torch keeps graphs of it"
    if why:
        raise QuestStrictError(f"strict=True: {why}\n{report}")


_backends: dict[QuestConfig, QuestBackend] = {}
_backends_lock = threading.RLock()


@takes_settings
def backend(**settings: Unpack[QuestSettings]) -> QuestBackend:
    """The Quest backend for ``torch.compile``; equal settings give the same object.

    The settings are the fields of :class:`quest_compile.QuestConfig`, which explains them.

    Raises:
        TypeError, ValueError: a setting has the wrong type or value, or an unknown name.
    """
    config = QuestConfig.from_options(settings)
    with _backends_lock:
        return _backends.setdefault(config, QuestBackend(config))


def _backend_of(config: dict[str, Any]) -> QuestBackend:
    return backend(**config)


def quest(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """``torch.compile(model, backend="quest", options={"budget": 2048})``."""
    return backend(**(options or {}))(gm, example_inputs, mode=mode)


def _reset_all() -> None:
    with _backends_lock:
        for made in _backends.values():
            made.reset()


# Called by torch._dynamo.reset() where the backend was named.
quest.reset = _reset_all  # type: ignore[attr-defined]


def report() -> Report:
    """The graphs of all Quest backends of this process, ``backend="quest"`` among them."""
    with _backends_lock:
        graphs = [graph for made in _backends.values() for graph in made._graphs]
        dense = sum((made._dense_generations for made in _backends.values()), collections.Counter())
    return Report(graphs, dense_generations=dense)
