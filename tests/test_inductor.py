"""What Inductor makes of a rewritten decode step."""

import os
import re
import subprocess
import sys

import pytest
import torch
from tiny_models import SHORT, random_prompt, tiny_model
from torch._inductor.utils import run_and_get_code

import quest_compile
from quest_compile import ops
from quest_compile.decoding import greedy_step, prefill

pytestmark = pytest.mark.inductor

LENGTH, MAX_SEQ_LEN = 200, 777


@pytest.fixture(scope="module")
def decode_step():
    """(generated code, tokens, counters) of three decode steps through Inductor."""
    torch._dynamo.reset()
    model = tiny_model("llama")
    step = torch.compile(
        model, backend=quest_compile.backend(**SHORT, budget=64), mode="reduce-overhead"
    )
    prompt = random_prompt(1, LENGTH)

    def run():
        cache = prefill(model, prompt[:, :-1], MAX_SEQ_LEN)
        token, tokens = prompt[:, -1:], []
        for i in range(3):
            token = greedy_step(step, cache, token, LENGTH - 1 + i)
            tokens.append(int(token))
        return tokens

    ops.reset_counters()
    with torch.no_grad():
        tokens, codes = run_and_get_code(run)
    return "\n".join(codes), tokens, ops.counters()


def test_the_operators_are_called(decode_step):
    code, _, counted = decode_step
    assert len(re.findall(r"torch\.ops\.quest\.sparse_decode\.default\(", code)) == 2
    assert len(re.findall(r"torch\.ops\.quest\.dense_decode\.default\(", code)) == 2
    assert len(re.findall(r"torch\.ops\.quest\.update_page_summary\.default\(", code)) == 2
    assert counted["sparse_calls"] == 2 * 3


def test_no_buffer_of_the_size_of_a_cache_is_made(decode_step):
    """A clone or copy of [1, 2, 777, 16] or of its 4-head repetition would need one."""
    code, _, _ = decode_step
    allocations = re.findall(r"empty_strided\w*\(\(([\d, ]+)\)", code)
    assert allocations, "the pattern does not fit the generated code any more"
    sizes = [eval(f"[{shape}]") for shape in allocations]
    assert not [
        shape for shape in sizes if MAX_SEQ_LEN in shape and len(shape) == 4 and shape[1] > 1
    ]
    assert not [shape for shape in sizes if torch.Size(shape).numel() >= 2 * MAX_SEQ_LEN * 16]
    assert "aten.clone" not in code
    assert "aten.copy_" not in code
    # Kernels loop over the 777 positions of the mask, and over nothing that is 777 keys long.
    assert re.search(rf"<static_cast<int64_t>\({MAX_SEQ_LEN}L\)", code)
    for length in (MAX_SEQ_LEN * 16, MAX_SEQ_LEN * 32):
        assert not re.search(rf"<static_cast<int64_t>\({length}L\)", code)


def test_the_mask_is_computed_once(decode_step):
    code, _, _ = decode_step
    assert len(re.findall(r"torch\.ops\.quest\.share_mask\.default\(", code)) == 1
    masks = [
        s for s in re.findall(r"empty_strided\w*\(\(([\d, ]+)\)", code) if str(MAX_SEQ_LEN) in s
    ]
    assert len(masks) == 1


def test_tokens_are_those_of_the_eager_rewrite(decode_step):
    _, tokens, _ = decode_step
    torch._dynamo.reset()
    model = tiny_model("llama")
    step = torch.compile(model, backend=quest_compile.backend(**SHORT, budget=64, inner="eager"))
    prompt = random_prompt(1, LENGTH)
    with torch.no_grad():
        cache = prefill(model, prompt[:, :-1], MAX_SEQ_LEN)
        token, expected = prompt[:, -1:], []
        for i in range(3):
            token = greedy_step(step, cache, token, LENGTH - 1 + i)
            expected.append(int(token))
    assert tokens == expected


_CACHE_PROGRAM = """
import torch, quest_compile
from torch._dynamo.utils import counters

def layer(query, key, key_cache, value_cache, position, mask):
    key_cache.index_copy_(2, position, key)
    value_cache.index_copy_(2, position, key)
    return torch.nn.functional.scaled_dot_product_attention(
        query, key_cache, value_cache, mask, enable_gqa=True)

caches = torch.zeros(2, 1, 2, 256, 16)
step = torch.compile(layer, backend=quest_compile.backend(
    budget=64, num_dense_layers=0, num_sink_pages=1, num_recent_pages=2))
with torch.no_grad():
    step(torch.ones(1, 4, 1, 16), torch.ones(1, 2, 1, 16), *caches,
         torch.tensor([200]), torch.ones(1, 1, 1, 256, dtype=torch.bool))
assert quest_compile.ops.counters()["sparse_calls"] == 1
print(counters["aot_autograd"]["autograd_cache_hit"], counters["inductor"]["fxgraph_cache_hit"])
"""


def test_compiled_code_is_cached_between_processes(tmp_path):
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    hits = [
        subprocess.run(
            [sys.executable, "-c", _CACHE_PROGRAM],
            env=environment, check=True, capture_output=True, text=True,
        ).stdout.split()
        for _ in range(2)
    ]  # fmt: skip
    assert hits == [["0", "0"], ["1", "1"]]
