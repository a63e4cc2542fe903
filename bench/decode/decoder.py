"""One method of end-to-end decoding: it decodes for itself, on a cache of its own."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import time
from collections.abc import Callable
from typing import Any

import torch

from quest_compile.bench.decode.check import CheckingBackend
from quest_compile.bench.decode.counts import StepCounts
from quest_compile.bench.decode.models import filled_cache, weight_bytes
from quest_compile.bench.progress import nothing
from quest_compile.bench.results import RefusedError
from quest_compile.config import QuestConfig
from quest_compile.decoding import greedy_step, rewind, step_inputs

# A bound for gross mistakes between ways to round 16-bit models; every attention call is checked
# against float64.
_LOGITS_TOLERANCE = 0.1


@dataclasses.dataclass(frozen=True)
class Place:
    """Where all methods decode: after ``context`` tokens, in a cache of ``capacity``."""

    context: int
    capacity: int
    batch: int


class Decoder:
    """One method: a compiled model, its cache, and what it decoded so far."""

    def __init__(
        self, name: str, model: Any, backend: Any, place: Place, config: QuestConfig | None
    ) -> None:
        self.name, self.place, self.config = name, place, config
        self.metadata: dict[str, Any] = {}
        self._model, self._backend = model, backend
        self._cache = filled_cache(model, place.context, place.capacity, place.batch)
        self._weight_bytes = weight_bytes(model)
        self.counts = StepCounts(model, self._cache, backend, config)
        # Of the first pass through the free part of the cache.
        self.tokens: list[list[int]] = []
        self._is_replacing = isinstance(config, QuestConfig)

    def prepare(self, mode: str | None, doing: Callable[[str], None] = nothing) -> torch.Tensor:
        """Check, compile, decode once; the logits [B, vocab] of that step.

        ``doing`` hears what goes on.

        Raises:
            RefusedError: a wrong result, or nothing was replaced.
        """
        self._start()
        if self._is_replacing:
            doing(f"{self.name}: checking every attention call")
            checked = self._check()
            self._start()
        doing(f"{self.name}: compiling")
        self._step = torch.compile(self._model, backend=self._backend, mode=mode)
        with torch.no_grad():
            inputs = step_inputs(self._cache, self._token, self._position)
            logits = self._step(**inputs).logits[:, -1].float().clone()
        self._start()
        if self._is_replacing:
            compare_logits(self.name, logits, checked)
        return logits

    def sample(self, number: int) -> float:
        """Decode one token; from the start again when the cache is full."""
        if self._position >= self.place.capacity:
            self._start()
            self._decode()
        self.counts.begin()
        seconds = self._decode()
        # The token that was decoded counts.
        self.counts.end(self._position)
        return seconds

    def facts(self) -> dict[str, Any]:
        """Metadata of a result: what was read per step, and a digest of the output.

        Raises:
            RefusedError: a layer that should be sparse was not, in some step.
        """
        if self._is_replacing:
            self.counts.check(self.name, self.metadata["sparse_layers"])
        found = self.metadata | {"cache_capacity": self.place.capacity} | self.counts.facts()
        return found | {
            "weight_bytes": self._weight_bytes,
            "bytes_moved": found["kv_bytes_per_step"] + self._weight_bytes,
            "digest": hashlib.sha256(str(self.tokens).encode()).hexdigest()[:16],
            "tokens_decoded": len(self.tokens),
        }

    def _check(self) -> torch.Tensor:
        """The logits of a step of the rewritten graph, run node by node and checked."""
        assert self.config is not None
        backend = CheckingBackend(self.config)
        checking = torch.compile(self._model, backend=backend)
        with torch.no_grad():
            logits = checking(**step_inputs(self._cache, self._token, self._position)).logits
        num_checked = sum(backend.layers.values())
        if not num_checked:
            raise RefusedError(f"{self.name}: no layer was replaced")
        is_long = self.place.capacity > self.config.page_budget * self.config.page_size
        if is_long and not backend.layers["sparse_decode"] and not self.name.startswith("dense"):
            raise RefusedError(f"{self.name}: no layer is sparse")
        self.metadata["replaced_layers"] = num_checked
        self.metadata["sparse_layers"] = backend.layers["sparse_decode"]
        self.metadata["error_over_that_of_torch"] = backend.worst
        return logits[:, -1].float()

    def _start(self) -> None:
        rewind(self._cache, self.place.context)
        self._position = self.place.context
        self._token = torch.zeros(self.place.batch, 1, dtype=torch.int64, device=self._model.device)

    def _decode(self) -> float:
        start = time.perf_counter()
        with torch.no_grad():
            token = greedy_step(self._step, self._cache, self._token, self._position)
        # Waits for the device.
        values = token.flatten().tolist()
        seconds = time.perf_counter() - start
        if len(self.tokens) == self._position - self.place.context:
            self.tokens.append(values)
        self._token, self._position = token.clone(), self._position + 1
        return seconds


def num_equal_tokens(own: list[list[int]], other: list[list[int]]) -> int:
    """How many steps both decoded alike before the first difference."""
    pairs = zip(own, other)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def relative_distance(logits: torch.Tensor, dense: torch.Tensor) -> float:
    return ((logits - dense).norm() / dense.norm()).item()


def compare_logits(name: str, logits: torch.Tensor, dense: torch.Tensor) -> float:
    """The relative distance of two logits of the same step.

    Raises:
        RefusedError: it is not a matter of rounding.
    """
    distance = relative_distance(logits, dense)
    if not distance <= _LOGITS_TOLERANCE:
        raise RefusedError(f"{name}: logits are wrong, relative distance {distance:.3g}")
    return distance
