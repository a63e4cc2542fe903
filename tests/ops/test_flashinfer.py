"""How FlashInfer is called, without FlashInfer: its part is played by fake_flashinfer.py."""

import os
import subprocess
import sys
import warnings

import fake_flashinfer
import pytest
import torch
from hostile import Case, make_inputs, wild_slots
from oracle import assert_as_accurate_as, in_float64, plain_attention

from quest_compile import ops
from quest_compile.ops import cuda_providers, flashinfer_attention, native, reference

_BF16, _F16 = torch.bfloat16, torch.float16
CASES = (
    Case(_BF16, 64, 64, 2, 4, 16, (100,), 128, "plain", "none", "sum"),
    Case(_F16, 128, 128, 1, 3, 32, (333, 64, 129), 352, "tokens_first", "none", "sum"),
    Case(_BF16, 64, 64, 3, 1, 8, (130, 1, 40), 136, "gaps", "ones", "sum"),
    Case(_F16, 64, 64, 2, 2, 24, (200, 23), 216, "tokens_first", "none", "none", 5),
    Case(_BF16, 256, 256, 1, 7, 64, (640, 100), 640, "gaps", "none", "none"),
)
every_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture
def other_calls(monkeypatch):
    """FlashInfer is installed; what is not its business is noted."""
    calls = []
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer.module())
    monkeypatch.setattr(flashinfer_attention, "_WORKSPACE_BYTES", 1024)
    monkeypatch.setattr(flashinfer_attention, "_wrappers", {})
    monkeypatch.setattr(native, "_announced", set())

    def other(name):
        def call(*arguments, **settings):
            calls.append(name)
            return getattr(reference, name)(*arguments, **settings)

        return call

    monkeypatch.setattr(cuda_providers, "triton_operator", other)
    return calls


def dense(inputs, **settings):
    return cuda_providers.flashinfer_operator("dense_decode")(*inputs.dense(), **settings)


def attend(inputs, pages, **settings):
    arguments = (inputs.query, inputs.key_cache, inputs.value_cache, pages, inputs.seq_lens)
    call = cuda_providers.flashinfer_operator("attend_pages")
    return call(*arguments, inputs.attn_mask, page_size=inputs.case.page_size, **settings)


@every_case
def test_dense_decode_is_attention_over_all_positions(case, other_calls):
    inputs = make_inputs(case)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = dense(inputs, scale=0.2)
    live = inputs.live[:, :, None]
    plain, _ = plain_attention(*inputs.clean(), live, case.dtype, 0.2)
    assert_as_accurate_as(
        plain, out, in_float64(reference.dense_decode, *_clean(inputs), scale=0.2)
    )
    assert not other_calls


def _clean(inputs):
    query, keys, values = inputs.clean()
    return query, keys, values, inputs.seq_lens, inputs.attn_mask


@every_case
def test_attend_pages_is_attention_over_the_pages_that_are_listed(case, other_calls):
    """In any order, with empty slots of any value in front, and for one row with nothing else."""
    inputs = make_inputs(case)
    pages = inputs.pages(inputs.scores()).flip(-1)
    pages[-1, -1] = -1
    pages = wild_slots(pages)
    out, lse = attend(inputs, pages)
    assert not other_calls
    query, keys, values, seq_lens, mask = _clean(inputs)
    arguments = (keys, values, pages, seq_lens, mask)
    exact, exact_lse = reference.attend_pages(query.double(), *arguments, page_size=case.page_size)
    plain, plain_lse = reference.attend_pages(
        query, *(x.to(case.dtype) for x in (keys, values)), *arguments[2:], page_size=case.page_size
    )
    assert_as_accurate_as(plain, out, exact)
    assert_as_accurate_as(plain_lse, lse, exact_lse)


def test_one_wrapper_serves_all_calls_and_each_is_planned(other_calls):
    inputs = make_inputs(CASES[0])
    for _ in range(3):
        dense(inputs)
    (wrapper,) = flashinfer_attention._wrappers.values()
    assert wrapper.num_plans == 3


def test_nothing_of_a_cache_is_copied():
    """Pages of FlashInfer are the memory of the cache, in every layout."""
    for case in CASES:
        cache = make_inputs(case).key_cache
        pages = flashinfer_attention._pages_of(cache, case.page_size)
        assert pages.untyped_storage().data_ptr() == cache.untyped_storage().data_ptr()
        assert pages[0].data_ptr() == cache.data_ptr()
        end = cache[-1, -1, -1, -1]
        assert pages[-1, 0, -1, -1].data_ptr() == end.data_ptr()


REFUSED = {
    "dtype torch.float32": Case(torch.float32),
    "head_dim 80": Case(_F16, 80, 80),
    "64 of values": Case(_F16, 128, 64),
    "strides": None,
    "forbids valid positions": Case(_F16, mask="left_padding", lengths=(100, 90)),
    "2 queries": None,
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_it_does_not_take_goes_to_other_kernels_and_is_said_once(why, other_calls):
    inputs = make_inputs(REFUSED[why] or Case(_F16))
    if why == "strides":
        inputs.value_cache = inputs.value_cache.transpose(1, 2).contiguous().transpose(1, 2)
    if why == "2 queries":
        inputs.query = inputs.query.expand(-1, -1, 2, -1)
    with pytest.warns(ops.NativeLibraryWarning, match=f"FlashInfer does not take this.*{why}") as w:
        for _ in range(2):
            dense(inputs)
    assert len(w) == 1 and other_calls == ["dense_decode"] * 2


def test_pages_that_do_not_fill_the_cache_are_refused(other_calls):
    inputs = make_inputs(Case(_F16, max_seq_len=130))
    with pytest.warns(ops.NativeLibraryWarning, match="max_seq_len 130"):
        attend(inputs, inputs.pages(inputs.scores()))
    dense(inputs)
    assert other_calls == ["attend_pages"]


def test_a_cuda_graph_cannot_hold_it(other_calls, monkeypatch):
    class OnCuda:
        is_cuda = True

    inputs = make_inputs(Case(_F16))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    arguments = (inputs.key_cache, inputs.value_cache, inputs.seq_lens, None, 16)
    assert "CUDA graph" in flashinfer_attention.why_not(OnCuda(), *arguments)


def test_where_it_is_not_installed_that_is_said_once_and_others_serve(other_calls, monkeypatch):
    monkeypatch.setattr(flashinfer_attention, "is_installed", lambda: False)
    inputs = make_inputs(Case(_F16))
    with pytest.warns(ops.NativeLibraryWarning, match="pip install 'quest_compile.flashinfer") as w:
        for _ in range(2):
            dense(inputs)
    assert len(w) == 1 and other_calls == ["dense_decode"] * 2


def test_bad_arguments_name_themselves(other_calls):
    inputs = make_inputs(Case(_F16))
    inputs.query = inputs.query[..., :32]
    with pytest.raises(ValueError, match="key_cache"):
        dense(inputs)


def test_it_serves_only_where_it_is_asked_for():
    code = (
        "import sys; from quest_compile import ops; names = ('dense_decode', 'attend_pages', "
        "'score_pages', 'sparse_decode'); print(*map(ops.provider_of, names), "
        "'flashinfer' in sys.modules, ops.cuda_kernels())"
    )
    for wanted, expected in (("flashinfer", ["flashinfer"] * 2), ("torch", ["torch"] * 2)):
        variables = os.environ | {"QUEST_COMPILE_CUDA_KERNELS": wanted}
        out = subprocess.check_output([sys.executable, "-W", "ignore", "-c", code], env=variables)
        *providers, is_imported, text = out.decode().split(maxsplit=5)
        assert providers[:2] == expected and is_imported == "False"
        assert "flashinfer" not in providers[2:]
        assert ("flashinfer" in text) == (wanted == "flashinfer")
