"""Caches and page summaries in huge pages, where the system lets us."""

import re
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import SHORT, random_prompt, tiny_model

import quest_compile
from quest_compile.decoding import greedy_step, prefill
from quest_compile.huge_pages import use_huge_pages

POLICY = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_bytes(tensor):
    """Bytes of the mapping that holds ``tensor`` that are in huge pages."""
    wanted, found = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if header := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = (int(x, 16) for x in header.groups())
            wanted = begin < tensor.data_ptr() + tensor.nbytes and tensor.data_ptr() < end
        elif wanted and line.startswith("AnonHugePages:"):
            found += 1024 * int(line.split()[1])
    return found


def test_filled_memory_moves_to_huge_pages_and_keeps_its_values(monkeypatch):
    if not POLICY.exists() or "[never]" in POLICY.read_text():
        pytest.skip("this system has no transparent huge pages")
    monkeypatch.delenv("QUEST_COMPILE_HUGE_PAGES", raising=False)
    tensor = torch.arange(4 * 2**20, dtype=torch.int32)
    if not use_huge_pages(tensor):
        pytest.skip("this system does not collapse memory into huge pages (before Linux 6.1)")
    assert huge_bytes(tensor) >= tensor.nbytes - 2 * 2**21
    assert torch.equal(tensor, torch.arange(4 * 2**20, dtype=torch.int32))


@pytest.mark.parametrize("shape", [(0,), (8,), (100, 100)])
def test_small_tensors_are_left_alone(shape):
    assert use_huge_pages(torch.zeros(shape)) is False


def test_the_variable_turns_it_off(monkeypatch):
    monkeypatch.setenv("QUEST_COMPILE_HUGE_PAGES", "0")
    assert use_huge_pages(torch.zeros(4 * 2**20)) is False


def test_other_systems_do_nothing(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert use_huge_pages(torch.zeros(4 * 2**20)) is False


def test_a_compiled_model_asks_once_for_keys_values_and_summaries(monkeypatch):
    asked = []
    monkeypatch.setattr(sys.modules["quest_compile.step_state"], "use_huge_pages", asked.append)
    torch._dynamo.reset()
    model = tiny_model("llama")
    step = torch.compile(model, backend=quest_compile.backend(**SHORT, budget=64, inner="eager"))
    prompt = random_prompt(1, 200)
    with torch.no_grad():
        cache = prefill(model, prompt[:, :-1], 512)
        for i in range(3):
            greedy_step(step, cache, prompt[:, -1:], 199 + i)
    sparse_layers = cache.layers[2:]
    expected = {t.data_ptr() for layer in sparse_layers for t in (layer.keys, layer.values)}
    found = [t.data_ptr() for t in asked]
    assert expected <= set(found)
    assert len(found) == len(set(found)) == 3 * len(sparse_layers)


def test_memory_of_a_file_is_left_alone(tmp_path):
    path = tmp_path / "cache"
    path.write_bytes(bytes(8 * 2**20))
    tensor = torch.from_file(str(path), shared=True, size=8 * 2**20, dtype=torch.uint8)
    assert not use_huge_pages(tensor)
    assert not advised(tensor) and advised(torch.zeros(8 * 2**20, dtype=torch.uint8)) is not None


def advised(tensor):
    """Whether the mapping of ``tensor`` is marked for huge pages."""
    is_mine = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if header := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = (int(x, 16) for x in header.groups())
            is_mine = begin <= tensor.data_ptr() < end
        elif is_mine and line.startswith("VmFlags:"):
            return " hg" in line
    return None
