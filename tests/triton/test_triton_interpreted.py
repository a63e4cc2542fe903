"""The operator tests on the Triton kernels, run by Triton's interpreter in processes of their own.

Few and small cases, as the interpreter is slow; ``make test-nightly`` runs them all.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

_TESTS = Path(__file__).resolve().parents[1]
# What counts tokens and bytes: on GPUs only calls are counted. What calls kernels without a case.
_NOT_FOR_GPUS = (
    "not counts and not never_attends_more and not native and not threads and not "
    "seals_each_page_once and not opcheck and not graph and not rebuilds_that_one"
)
_QUICK = {
    ("test_score_pages.py", "test_select_pages.py"): (
        "is_the_definition or selects_as_the_contract or (special_scores and 4) or budget_beyond"
    ),
    ("test_attend_pages.py", "test_dense_decode.py", "test_sparse_decode.py"): (
        "listed_pages or all_live_positions or any_strides or equals_score_select_attend or "
        "(any_length and dtype0 and 17)"
    ),
}
_ALL = (
    *(name for names in _QUICK for name in names),
    "test_update_page_summary.py",
    "test_sparse_decode_step.py",
    "test_several_queries.py",
    "test_sketch.py",
    "test_group_softmax.py",
)
# What has cases of its own, that are small enough; of 64 rows no more than is chosen.
_SMALL = {
    "../triton/both_summaries.py": "test",
    "../triton/ways_to_select.py": "test",
    "test_model_shapes.py": "wide or scores_pages_and_attention",
}


def run_interpreted(files, chosen, **variables):
    """pytest's last line; every test must pass and some must run."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "triton_on_cpu", "-p", "no:warnings"]
    command += ["-p", "no:cacheprovider", "--tb=short", "-k", f"({chosen}) and {_NOT_FOR_GPUS}"]
    folders = [_TESTS, _TESTS / "triton", _TESTS / "ops"]
    path = os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, *(str(_TESTS / "ops" / name) for name in files)],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path} | variables,
        capture_output=True,
        text=True,
        cwd=_TESTS.parent,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    summary = done.stdout.strip().splitlines()[-1]
    assert int(re.search(r"(\d+) passed", summary)[1]) > 0


@pytest.mark.parametrize("names", _QUICK, ids=["selection", "attention"])
def test_operators_in_the_interpreter(names):
    run_interpreted(names, _QUICK[names])


@pytest.mark.nightly
@pytest.mark.parametrize("name", _SMALL)
def test_small_cases_in_the_interpreter(name):
    run_interpreted([name], _SMALL[name])


@pytest.mark.nightly
@pytest.mark.parametrize("name", _ALL)
def test_every_case_in_the_interpreter(name):
    run_interpreted([name], "test", QUEST_TRITON_CASES="all")
