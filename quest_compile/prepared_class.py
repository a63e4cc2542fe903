"""Subclasses that pass for the class they are made of, and are pickled by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def prepared_class(
    base: Any,
    make: Callable[[Any], Any],
    fields: dict[str, Any],
    kept: Callable[[dict[str, Any]], dict[str, Any]] = lambda state: state,
) -> Any:
    """A subclass of ``base`` with its name and ``fields``.

    ``make``: the function at the top of a module that makes it of ``base``, for copies; ``kept``:
    which attributes those get.
    """

    def reduce(self: Any, protocol: Any) -> Any:
        return _new, (make, base), kept(vars(self))

    own = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": reduce,
        "_unprepared_class": base,
    }
    return type(base.__name__, (base,), own | fields)


def _new(make: Callable[[Any], Any], base: Any) -> Any:
    prepared = make(base)
    return prepared.__new__(prepared)
