"""Which graphs become CUDA graphs, and what is copied out of them; without a GPU."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from quest_compile.cuda_graphs import wants_cuda_graph, with_own_outputs
from quest_compile.passes import AttentionCall, AttentionSite, Decision, Reason, Treatment


def decision(device="cuda", treatment=Treatment.SPARSE, **fields):
    key_cache = torch.fx.Graph().placeholder("key_cache")
    with FakeTensorMode():
        key_cache.meta["example_value"] = torch.empty(1, 2, 64, 8, device=device)
    site = AttentionSite(None, key_cache, key_cache, key_cache, key_cache, None, None, 1, None)
    call = AttentionCall(key_cache, 2, "", 1, site, None)
    return Decision(call, treatment, Reason.SPARSE, **fields)


SPARSE = decision()
PREFILL = decision(treatment=Treatment.DENSE, needs_summary=True)


@pytest.mark.parametrize(
    "decisions",
    [[SPARSE], [decision(treatment=Treatment.DENSE, operator="dense_decode")], [PREFILL, SPARSE]],
)
def test_decode_on_cuda_is_a_cuda_graph_without_a_mode(decisions):
    assert wants_cuda_graph(decisions, "inductor", None, {})


def test_prefill_other_devices_and_other_compilers_are_left_alone():
    assert not wants_cuda_graph([PREFILL], "inductor", None, {})
    assert not wants_cuda_graph([decision("cpu")], "inductor", None, {})
    assert not wants_cuda_graph([SPARSE], "aot_eager", None, {})


@pytest.mark.parametrize("asked_for", [True, False])
def test_what_the_user_says_counts(asked_for):
    assert not wants_cuda_graph([SPARSE], "inductor", None, {"triton.cudagraphs": asked_for})
    assert not wants_cuda_graph([SPARSE], "inductor", "reduce-overhead", {})


def test_results_may_be_kept_and_views_of_arguments_stay_views():
    memory, cache = torch.zeros(2, 3), torch.zeros(4)
    twice = torch.zeros(2)

    def replay(step, cache):
        memory.fill_(int(step))
        return memory[0:1], cache[:2], None, twice[:1], twice[1:]

    replay_alone = with_own_outputs(replay)
    first, view, nothing, *parts = replay_alone(torch.tensor(1), cache)
    second = replay_alone(torch.tensor(2), cache)[0]
    assert first.tolist() == [[1, 1, 1]] and second.tolist() == [[2, 2, 2]]
    assert view.data_ptr() == cache.data_ptr() and nothing is None
    assert parts[0].untyped_storage().data_ptr() == parts[1].untyped_storage().data_ptr()
