"""The operators of the namespace ``quest``, in one table: schema, checks, plain torch, fake.

A module of ops defines one with ``operator``; kernels of devices, counters, benchmarks and tests
read the table.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quest_compile.ops.native import announce_reference, native_status

DEVICES = ("cpu", "cuda")


@dataclasses.dataclass(frozen=True)
class Operator:
    """``check``, ``reference`` and ``fake`` take what the schema says.

    ``check``: raises ValueError or TypeError, naming the argument.
    ``reference``: the results in plain torch, counted; serves where no kernel is registered.
    ``fake``: empty results, for tracing.
    ``kernels``: the devices that have kernels for it.
    """

    name: str
    schema: str
    check: Callable[..., None]
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    kernels: tuple[str, ...] = DEVICES

    @functools.cached_property
    def overload(self) -> Any:
        return getattr(torch.ops.quest, self.name).default

    @functools.cached_property
    def num_tensors(self) -> int:
        """Positional arguments, all of them tensors or None."""
        return sum(not argument.kwarg_only for argument in self.overload._schema.arguments)

    def in_full(self, tensors: tuple) -> tuple:
        """The dispatcher leaves out what has its default, which is None for tensors."""
        return (*tensors, *[None] * (self.num_tensors - len(tensors)))

    def __call__(self, *tensors: Any, **settings: Any) -> Any:
        """The operator, after ``check``.

        Kernels on CPUs refuse the same arguments by themselves, before they write anything, and a
        small call takes less time than ``check``: there it only finds better words for what they
        refused.
        """
        if not self._kernel_checks(tensors[0]):
            self.check(*tensors, **settings)
            return self.overload(*tensors, **settings)
        try:
            return self.overload(*tensors, **settings)
        except Exception:
            self.check(*tensors, **settings)
            raise

    def _kernel_checks(self, first: object) -> bool:
        return (
            "cpu" in self.kernels
            and isinstance(first, Tensor)
            and first.is_cpu
            and not torch.compiler.is_compiling()
            and native_status().loaded
        )

    def serve(self, *tensors: Any, **settings: Any) -> Any:
        """In plain torch, checked."""
        tensors = self.in_full(tensors)
        self.check(*tensors, **settings)
        if self.kernels:
            announce_reference(self.name, tensors[0])
        return self.reference(*tensors, **settings)

    def trace(self, *tensors: Any, **settings: Any) -> Any:
        tensors = self.in_full(tensors)
        self.check(*tensors, **settings)
        return self.fake(*tensors, **settings)


OPERATORS: dict[str, Operator] = {}


def operator(
    name: str,
    schema: str,
    *,
    check: Callable[..., None],
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    kernels: tuple[str, ...] = DEVICES,
) -> Operator:
    """Declares ``quest::<name>``. Kernels may be registered before or after this."""
    made = OPERATORS[name] = Operator(name, schema, check, reference, fake, kernels)
    torch.library.define(f"quest::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"quest::{name}", "CompositeExplicitAutograd", made.serve)
    torch.library.register_fake(f"quest::{name}", made.trace)
    return made


def empty_attention(query: Tensor, value_cache: Tensor) -> Tensor:
    """[batch, num_q_heads, q_len, value_dim], the heads of a query side by side in memory."""
    batch, num_q_heads, q_len, _ = query.shape
    return query.new_empty(batch, q_len, num_q_heads, value_cache.shape[3]).transpose(1, 2)
