"""Instruction sets side by side: a process for each level, asked for one sample after the other.

A process picks its kernels at its first call and keeps them, so levels cannot share one; rounds are
interleaved over the processes, which sleep while another is measured.
"""

from __future__ import annotations

import multiprocessing
import os
from typing import Any

from quest_compile.bench.ops.inputs import Workload
from quest_compile.bench.ops.measure import prepare, results_of
from quest_compile.bench.ops.methods import Method
from quest_compile.bench.results import RefusedError, Result
from quest_compile.bench.rounds import Rounds, Sampler, Samples, measure_rounds
from quest_compile.bench.settings import Setting


def measure_levels(
    levels: list[str],
    workload: Workload,
    settings: list[Setting],
    wanted: list[str] | None,
    rounds: Rounds,
) -> tuple[list[Result], Samples]:
    """Results whose methods are called ``METHOD@LEVEL``."""
    workers = []
    try:
        for level in levels:
            workers.append(_Worker(level, workload, settings, wanted))
        samplers = {
            f"{key}@{worker.level}": worker.sampler(key)
            for worker in workers
            for key in worker.moved
        }
        pids = [worker.pid for worker in workers]
        samples = measure_rounds(samplers, rounds, f"{workload.name} @levels", pids)
    finally:
        for worker in workers:
            worker.close()
    results = []
    for worker in workers:
        suffix = f"@{worker.level}"
        results += results_of(
            workload, worker.methods, samples, worker.moved, worker.facts, suffix=suffix
        )
    return results, samples


class _Worker:
    """A process with the kernels of one level."""

    def __init__(
        self, level: str, workload: Workload, settings: list[Setting], wanted: list[str] | None
    ) -> None:
        self.level = level
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(
            target=_serve, args=(theirs, workload, settings, wanted), daemon=True
        )
        before = os.environ.get("QUEST_COMPILE_ISA")
        os.environ["QUEST_COMPILE_ISA"] = level
        try:
            self._process.start()
        finally:
            del os.environ["QUEST_COMPILE_ISA"]
            if before is not None:
                os.environ["QUEST_COMPILE_ISA"] = before
        theirs.close()
        try:
            answer = self._pipe.recv()
        except EOFError:
            self.close()
            raise RefusedError(f"the process for QUEST_COMPILE_ISA={level} ended") from None
        if isinstance(answer, str):
            self.close()
            raise RefusedError(f"QUEST_COMPILE_ISA={level}: {answer}")
        keys, self.moved, self.facts = answer
        self.methods = [
            Method(key.partition("/")[0], _elsewhere, moved, setting, key.partition("/")[2])
            for (key, setting), moved in zip(keys, self.moved.values())
        ]
        self.pid: int = self._process.pid or 0

    def sampler(self, key: str) -> Sampler:
        def sample(number: int) -> float:
            self._pipe.send((key, number))
            return self._pipe.recv()

        return sample

    def close(self) -> None:
        self._pipe.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.terminate()


def _elsewhere(_: Any) -> None:
    raise AssertionError("this method runs in another process")


def _serve(
    pipe: Any, workload: Workload, settings: list[Setting], wanted: list[str] | None
) -> None:
    """Answer ``(key, round)`` with seconds until the other end closes."""
    try:
        methods, samplers, facts = prepare(workload, settings, wanted)
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
        return
    keys = [(m.key, m.setting) for m in methods]
    pipe.send((keys, {m.key: m.bytes_moved for m in methods}, facts))
    try:
        while True:
            key, number = pipe.recv()
            pipe.send(samplers[key](number))
    except (EOFError, KeyboardInterrupt):
        return
