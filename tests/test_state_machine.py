"""Whatever is done to caches, in any order: the next tokens are those of a fresh run."""

import re

import pytest
import torch
import transformers
from decode_machine import DecodeMachine
from hypothesis import HealthCheck, seed, settings
from hypothesis.internal.conjecture import engine
from hypothesis.stateful import run_state_machine_as_test
from sabotage import without_checks

from quest_compile import ops

pytestmark = pytest.mark.skipif(
    transformers.__version__ < "5", reason="transformers 4 keeps positions outside of the cache"
)

NUM_PROGRAMS = 50
NUM_NIGHTLY_PROGRAMS, NUM_NIGHTLY_PARTS = 2000, 10
NUM_RULES = 12

MAX_SHRINKING_SECONDS = 30

# Each is found with these checks taken out. The version counter alone is no such check: caches as
# small as these have hardly a page that is not sampled.
PLANTED = [
    ("sampled pages",),
    ("position",),
    ("version", "sampled pages"),
    ("state per cache", "sampled pages"),
]


@pytest.fixture(autouse=True)
def _one_graph_per_kind_of_cache():
    ops.reset_counters()
    with torch._dynamo.config.patch(recompile_limit=64):
        yield


def run_programs(num_programs, first_seed, before_each=lambda: None):
    def start():
        before_each()
        return DecodeMachine()

    run_state_machine_as_test(
        seed(first_seed)(start),
        settings=settings(
            max_examples=num_programs,
            stateful_step_count=NUM_RULES,
            deadline=None,
            database=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_random_programs_give_the_tokens_of_fresh_runs():
    run_programs(NUM_PROGRAMS, 0)
    assert ops.counters()["sparse_calls"] > NUM_PROGRAMS


@pytest.mark.nightly
@pytest.mark.parametrize("part", range(NUM_NIGHTLY_PARTS))
def test_many_random_programs_give_the_tokens_of_fresh_runs(part):
    run_programs(NUM_NIGHTLY_PROGRAMS // NUM_NIGHTLY_PARTS, part + 1)
    assert ops.counters()["sparse_calls"] > NUM_NIGHTLY_PROGRAMS // NUM_NIGHTLY_PARTS


@pytest.mark.nightly
@pytest.mark.parametrize("checks", PLANTED, ids=", ".join)
def test_a_planted_bug_is_found_and_shrunk_to_a_program(checks, monkeypatch):
    monkeypatch.setattr(engine, "MAX_SHRINKING_SECONDS", MAX_SHRINKING_SECONDS)
    with without_checks(*checks, num_layers=1) as forget, pytest.raises(AssertionError) as raised:
        run_programs(NUM_NIGHTLY_PROGRAMS // NUM_NIGHTLY_PARTS, 0, before_each=forget)
    program = "\n".join(raised.value.__notes__)
    assert "state = DecodeMachine()" in program
    calls = re.findall(r"^state\.(\w+)\(", program, re.MULTILINE)
    invariants = ("a_step_is_that_of_a_fresh_run", "teardown")
    assert calls[0] == "start"
    assert len([call for call in calls if call not in invariants]) > 1
