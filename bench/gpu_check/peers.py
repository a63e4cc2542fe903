"""Dense attention by torch; what is not there says so when it is tried."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from quest_compile.bench.ops.inputs import Step, Workload
from quest_compile.bench.ops.methods import (
    Method,
    sdpa_enable_gqa,
    sdpa_group_as_q_len,
    sdpa_transformers,
)


def peers_of(workload: Workload, steps: list[Step]) -> list[Method]:
    flash, cudnn = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
    calls: dict[str, Callable[[Step], Any]] = {
        "sdpa_enable_gqa": sdpa_enable_gqa,
        "sdpa_group_as_q_len": sdpa_group_as_q_len,
    }
    if workload.device == "cuda":
        calls = {
            "sdpa_enable_gqa, flash": _by(flash, sdpa_enable_gqa),
            "sdpa_enable_gqa, cudnn": _by(cudnn, sdpa_enable_gqa),
            "sdpa_group_as_q_len, flash": _by(flash, sdpa_group_as_q_len),
            "sdpa_transformers": sdpa_transformers(steps[0])[0],
        }
    return [Method(name, call, workload.dense_bytes) for name, call in calls.items()]


def _by(backend: SDPBackend, call: Callable[[Step], Any]) -> Callable[[Step], torch.Tensor]:
    def with_backend(s: Step) -> torch.Tensor:
        with sdpa_kernel(backend):
            return call(s)

    return with_backend
