"""One method in a process of its own: what compilation and memory cost from a fresh start."""

from __future__ import annotations

import multiprocessing
import os
from typing import Any

from quest_compile.bench.decode.fresh_start import Found, Probe, measure_fresh
from quest_compile.bench.results import RefusedError


def run_probe(probe: Probe) -> Found:
    """What a fresh process found; Ctrl-C ends it.

    Raises:
        RefusedError: the process failed, or nothing was replaced.
    """
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    variable, before = "TORCHINDUCTOR_CACHE_DIR", os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if probe.cache_folder:
        os.environ[variable] = probe.cache_folder
    process = spawn.Process(target=_serve, args=(theirs, probe))
    answer: Found | str
    try:
        process.start()
        theirs.close()
        answer = ours.recv()
    except EOFError:
        answer = "it ended"
    except KeyboardInterrupt:
        process.terminate()
        raise
    finally:
        if probe.cache_folder:
            os.environ.pop(variable)
            if before is not None:
                os.environ[variable] = before
        process.join()
    if isinstance(answer, str):
        raise RefusedError(f"the process of {probe.method}: {answer}")
    return answer


def facts_of(found: list[Found]) -> dict[str, Any]:
    """What the processes of one method have in common.

    Raises:
        RefusedError: they decoded different tokens.
    """
    digests = {each.facts["digest"] for each in found}
    if len(digests) > 1:
        raise RefusedError(f"processes of the same method decoded differently: {sorted(digests)}")
    return dict(found[0].facts)


def _serve(pipe: Any, probe: Probe) -> None:
    try:
        pipe.send(measure_fresh(probe))
    except KeyboardInterrupt:
        return
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
