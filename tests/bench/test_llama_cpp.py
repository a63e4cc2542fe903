"""llama.cpp as a peer: the state of its cache and, where it is installed, a decode step."""

import struct
import weakref

import pytest
import torch

from quest_compile.bench.llama_cpp.gguf_file import one_layer_shape, write_gguf
from quest_compile.bench.llama_cpp.kv_state import KvState
from quest_compile.bench.llama_cpp.session import LlamaModel, LlamaSession, is_installed
from quest_compile.bench.shapes import SHAPES, Layer

needs_llama_cpp = pytest.mark.skipif(not is_installed(), reason="llama-cpp-python is not installed")


def state(num_tokens, is_transposed):
    """One layer of 3 channels in 2 bytes each, as llama.cpp writes it."""
    data = struct.pack("<IIII", 0xABCD, 0, 1, num_tokens)
    data += b"".join(struct.pack("<iIi", i, 1, 0) for i in range(num_tokens))
    data += struct.pack("<II", is_transposed, 1)
    data += struct.pack("<iQ", 1, 6) + bytes(range(6 * num_tokens))
    if is_transposed:
        data += struct.pack("<iII", 1, 2, 3)
    else:
        data += struct.pack("<iQ", 1, 6)
    return data + bytes(range(100, 100 + 6 * num_tokens))


@pytest.mark.parametrize("is_transposed", [0, 1])
def test_a_state_repeats_its_tokens(is_transposed):
    parsed = KvState(state(4, is_transposed))
    assert parsed.repeated(4) == state(4, is_transposed)
    longer = KvState(parsed.repeated(9))
    assert longer.num_tokens == 9
    assert torch.equal(longer._keys[0].rows[[0, 3]], longer._keys[0].rows[[8, 7]])
    axis = 1 if is_transposed else 0
    values = longer._values[0].rows
    pick = torch.tensor([0, 3]), torch.tensor([8, 7])
    assert torch.equal(*(values.index_select(axis, tokens) for tokens in pick))


@pytest.mark.parametrize("cut", [10, 70, 100])
def test_another_layout_is_refused(cut):
    with pytest.raises(ValueError, match="the state of llama.cpp has another layout"):
        KvState(state(4, 0)[:cut])
    with pytest.raises(ValueError, match="another layout: positions"):
        KvState(state(4, 0)[4:])


def test_only_llama_shapes_have_a_file(tmp_path):
    pytest.importorskip("gguf")
    with pytest.raises(ValueError, match="not qwen3"):
        write_gguf(tmp_path / "x.gguf", SHAPES["qwen3-4b"])


@needs_llama_cpp
@pytest.mark.parametrize("flash_attention", [False, True])
def test_a_step_decodes_behind_the_filled_context(flash_attention, tmp_path):
    write_gguf(tmp_path / "x.gguf", one_layer_shape(Layer(4, 2, 16)))
    model = LlamaModel(tmp_path / "x.gguf")
    session = LlamaSession(model, 300, flash_attention=flash_attention, threads=1, spare=8)
    assert session.step() > 0
    assert session.num_tokens == 301
    session.rewind(300)
    assert session.step() > 0
    # A context is freed with its session, a model with its last context.
    kept, freed = weakref.ref(model), weakref.ref(session)
    del model
    assert kept() is not None
    del session
    assert (kept(), freed()) == (None, None)
