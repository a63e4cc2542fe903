"""Is there such a model? Asked before anything that takes seconds; nothing here imports torch."""

from __future__ import annotations

import contextlib
import functools
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from quest_compile.real_model import resolve_model

_TIMEOUT_SECONDS = 5


def find_model(name: str) -> str:
    """What ``from_pretrained`` takes: a folder, or the name of a model of the hub.

    Raises:
        ValueError: no such folder, a name in ``SOURCES`` that was not fetched yet, or one of the
            hub that is not in its cache while the hub cannot be reached.
    """
    return _find(name)[0]


@contextlib.contextmanager
def found_model(name: str) -> Iterator[str]:
    """``find_model`` around what loads it: the hub is not asked for more about a folder, nor again
    where it cannot be reached and its cache has the model.

    Raises:
        ValueError: see ``find_model``.
    """
    path, is_here = _find(name)
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or is_here
    try:
        yield path
    finally:
        constants.HF_HUB_OFFLINE = before


def _find(name: str) -> tuple[str, bool]:
    """(``find_model``, whether all that there is of it is on this machine)."""
    path = Path(resolve_model(name)).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"the folder {name} holds no model: it has no config.json")
        return str(path), True
    if path.exists():
        raise ValueError(f"{name} is a file: a model is a folder with a config.json")
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"there is no folder {name}")
    return name, _is_only_cached(name)


def _is_only_cached(name: str) -> bool:
    from huggingface_hub import constants

    cached = Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}", "snapshots")
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _why_unreachable(name)
    if reason and not cached.is_dir():
        raise ValueError(
            f"there is no folder {name}, and no model of that name in the cache of the hub, "
            f"which cannot be asked: {reason}"
        )
    return bool(reason)


@functools.cache
def _why_unreachable(name: str) -> str:
    """Empty where something answered, whatever it said: transformers reports that better."""
    from huggingface_hub import constants

    url = f"{constants.ENDPOINT}/{name}/resolve/main/config.json"
    try:
        request = urllib.request.Request(url, method="HEAD")
        urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS).close()
    except urllib.error.HTTPError:
        return ""
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        is_answer = "CERTIFICATE" in str(reason)
        return "" if is_answer else f"{constants.ENDPOINT}: {reason}"
    return ""
