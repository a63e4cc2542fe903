"""Finding the native library, in fresh processes."""

import os
import subprocess
import sys

import pytest

from quest_compile import ops

_CALL = """
import warnings
warnings.simplefilter("always")
with warnings.catch_warnings(record=True) as caught:
    import torch
    from quest_compile import ops
    at_import = len([w for w in caught if "quest" in str(w.message)])
    keys = torch.zeros(1, 1, 64, 8)
    for _ in range(3):
        ops.build_page_summary(keys, torch.tensor([64]))
        ops.dense_decode(keys[:, :, :1], keys, keys, torch.tensor([64]))
    ops.warn_if_missing()
    found = [w for w in caught if issubclass(w.category, ops.NativeLibraryWarning)]
print(at_import, len(found), ops.native_status().loaded, ops.native_status().reason)
"""


def run(code, **variables):
    environment = {**os.environ, **variables}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_missing_library_is_announced_once_and_not_at_import():
    at_import, at_calls, loaded, *reason = run(_CALL, QUEST_COMPILE_NATIVE="0")
    assert (at_import, at_calls, loaded) == ("0", "1", "False")
    assert " ".join(reason) == "disabled by QUEST_COMPILE_NATIVE=0"


def test_native_library_announces_nothing(serves_natively):
    if not serves_natively:
        pytest.skip("no native library here")
    assert run(_CALL) == ["0", "0", "True"]


def test_broken_library_does_not_break_the_import(tmp_path):
    (tmp_path / "libquest.so").write_text("not a library")
    code = (
        "import sys, quest_compile.ops.native as native\n"
        f"sys.modules['quest_compile'].__path__.insert(0, {str(tmp_path)!r})\n"
        "native._status = None\n"
        "print(native.native_status())"
    )
    out = " ".join(run(code, QUEST_COMPILE_NATIVE="", QUEST_COMPILE_LIBRARY=""))
    assert "loaded=False" in out and "libquest.so does not load" in out


def test_status_names_the_kernels_or_the_reason():
    status = ops.native_status()
    assert status.info.startswith("cpu:") if status.loaded else status.reason
    assert bool(status.reason) != status.loaded
