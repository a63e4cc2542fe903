"""The loop over contexts, methods and budgets; it can be interrupted at any time."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch

from quest_compile.budgets import TokensOrShare
from quest_compile.config import QuestConfig
from quest_compile.eval.attention import NAME
from quest_compile.eval.encode import Encoder
from quest_compile.eval.methods import DENSE, Decoder, Method
from quest_compile.eval.protocol import Measurement, Session
from quest_compile.eval.records import Cell, Records
from quest_compile.eval.samples import AGREEMENT, Context, Group, NotActiveError
from quest_compile.progress import progress_bar


def run(
    model: Any,
    encoder: Encoder | None,
    groups: Sequence[Group],
    methods: Sequence[Method],
    budgets: Sequence[TokensOrShare],
    config: QuestConfig,
    records: Records,
    progress: bool = True,
) -> None:
    """Measure every cell that ``records`` lacks.

    Raises:
        NotActiveError: a method attended everything at a budget smaller than the context.
    """
    # One graph per budget, setting and cache: as many as asked for, none with symbolic sizes.
    limits = {"recompile_limit": 1000, "accumulated_recompile_limit": 10000}
    with torch._dynamo.config.patch({"automatic_dynamic_shapes": False, **limits}):
        _run(model, encoder, groups, methods, budgets, config, records, progress)


def _run(
    model: Any,
    encoder: Encoder | None,
    groups: Sequence[Group],
    methods: Sequence[Method],
    budgets: Sequence[TokensOrShare],
    config: QuestConfig,
    records: Records,
    progress: bool,
) -> None:
    decoder, measurement = Decoder(model, config), Measurement(model, encoder)
    sessions: dict[int, Session] = {}
    variants: list[tuple[Method, TokensOrShare]] = [(Method(DENSE, DENSE), 0)]
    variants += [(m, budget) for m in methods if m.kind != DENSE for budget in m.budgets(budgets)]
    cells = {
        (group, number): [
            (Cell(group.task, group.length, number, method.name, budget), method)
            for method, budget in variants
        ]
        for group in groups
        for number in range(group.num_contexts)
    }
    missing = {
        key: [(cell, method) for cell, method in found if cell not in records.lines]
        for key, found in cells.items()
    }
    attention = model.config._attn_implementation
    try:
        total = sum(map(len, cells.values()))
        num_done = total - sum(map(len, missing.values()))
        bar = progress_bar(total, "cell", initial=num_done, is_shown=progress)
        with bar:
            for (group, number), wanted in missing.items():
                if not wanted:
                    continue
                bar.doing(f"{group.task} {group.length or ''} prefill")
                context = group.make(number)
                session = sessions.get(group.max_seq_len)
                if session is None:
                    sessions = {group.max_seq_len: Session(model, group.max_seq_len)}
                    session = sessions[group.max_seq_len]
                _prefill(decoder, session, context, [method for _, method in wanted])
                if group.kind == AGREEMENT and wanted[0][1].kind != DENSE:
                    call = decoder.begin(Method(DENSE, DENSE), 0, "")
                    measurement.cell(group.kind, session, call, context, is_dense=True)
                for cell, method in wanted:
                    bar.doing(f"{group.task} {group.length or ''} {method.name}")
                    _measure(decoder, measurement, session, group, context, cell, method, records)
                    bar.update()
    finally:
        model.set_attn_implementation(attention)


def _prefill(
    decoder: Decoder, session: Session, context: Context, methods: Sequence[Method]
) -> None:
    watch = any(method.needs_watching for method in methods)
    decoder.attention.begin_context(len(context.tokens), watch)
    decoder.model.set_attn_implementation(NAME if watch else "sdpa")
    session.prefill(context.tokens)


def _measure(
    decoder: Decoder,
    measurement: Measurement,
    session: Session,
    group: Group,
    context: Context,
    cell: Cell,
    method: Method,
    records: Records,
) -> None:
    start = time.perf_counter()
    call = decoder.begin(method, cell.budget, repr(cell))
    is_dense = method.kind == DENSE
    found = measurement.cell(group.kind, session, call, context, is_dense)
    seconds = time.perf_counter() - start
    activity = decoder.activity()
    if not is_dense and not activity.sparse_steps:
        config = decoder.config_of(method, cell.budget)
        if not _covers(config, decoder.model, len(context.tokens) + 1):
            report = decoder.report(method, cell.budget) if method.kind == "quest" else ""
            raise NotActiveError(
                f"{method.name} with budget {config.budget} attended all {len(context.tokens)} "
                f"tokens of a context of task {group.task}: nothing to compare\n{report}"
            )
    records.add(
        cell,
        kind=group.kind,
        implementation=decoder.implementation(method),
        context_tokens=len(context.tokens),
        activity=dataclasses.asdict(activity),
        seconds=round(seconds, 3),
        **found,
    )


def _covers(config: QuestConfig, model: Any, seq_len: int) -> bool:
    """Is every layer that could be sparse dense for so many tokens, by its budget?"""
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    layers = range(config.num_dense_layers, num_layers)
    num_pages = config.page_format.num_pages(seq_len)
    covered = [config.layer_budget(layer, seq_len).covers(num_pages) for layer in layers]
    return bool(covered) and all(covered)
