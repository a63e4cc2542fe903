"""A process that ends at any moment leaves a file that opens right or is refused; and what else may
befall a file."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from killed_writers import CONFIG, MAX_SEQ_LEN, states_of
from killed_writers import __file__ as killed_writers
from limited_decoder import CACHE_BYTES
from limited_decoder import __file__ as limited_decoder

from quest_compile import OffloadedStaticCache
from quest_compile.cache_file import CacheFile
from quest_compile.cache_record import Record

LENGTH = 100


def new(path, **settings):
    return OffloadedStaticCache(CONFIG, MAX_SEQ_LEN, path=path, num_dense_layers=1, **settings)


def fill(cache, tokens, position=0):
    for layer in range(3):
        keys = states_of(tokens, position, layer).expand(len(tokens), -1, -1, -1)
        cache.update(keys, -keys, layer)


@pytest.fixture
def text():
    return torch.arange(LENGTH)[None]


@pytest.fixture
def saved(tmp_path, text):
    """A path with a file that nobody uses."""
    cache = new(tmp_path / "book.kv")
    fill(cache, text)
    cache.save(text)
    cache.close()
    return tmp_path / "book.kv"


def reopened(path, **arguments):
    """As another process finds the file now: through a copy, which has no lock."""
    copy = Path(f"{path}.copy")
    shutil.copy(path, copy)
    return OffloadedStaticCache.open(CONFIG, copy, **arguments)


@pytest.mark.parametrize("times", [20, pytest.param(400, marks=pytest.mark.nightly)])
def test_killed_at_any_moment_it_opens_right_or_is_refused(times, tmp_path):
    folder = Path("/dev/shm") / f"{tmp_path.parent.name}-{os.getpid()}"
    if not folder.parent.is_dir():
        folder = tmp_path / "killed"
    folder.mkdir()
    try:
        command = [sys.executable, killed_writers, str(folder), str(times), "0"]
        done = subprocess.run(command, capture_output=True, text=True)
    finally:
        shutil.rmtree(folder)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert sum(found.values()) == times
    assert found["opened"] and set(found) <= {"opened", "withdrawn", "nothing"}


def test_tokens_behind_the_saved_ones_do_not_touch_them(saved, text):
    cache = OffloadedStaticCache.open(CONFIG, saved)
    fill(cache, text[:, :20], LENGTH)
    assert int(reopened(saved, tokens=text).get_seq_length()) == LENGTH


@pytest.mark.parametrize("go_back", ["reset", "rewind", "by hand"])
def test_tokens_in_front_withdraw_it_until_it_is_saved_again(go_back, saved, text):
    cache = OffloadedStaticCache.open(CONFIG, saved)
    length = 0 if go_back == "reset" else 60
    if go_back == "reset":
        cache.reset()
    elif go_back == "rewind":
        cache.rewind(60)
    else:
        for layer in cache.layers:
            layer.cumulative_length.fill_(60)
    fill(cache, text[:, :20] + 5, length)
    with pytest.raises(ValueError, match="in front of the end of what had been saved"):
        reopened(saved)
    now = torch.cat([text[:, :length], text[:, :20] + 5], 1)
    cache.save(now)
    assert torch.equal(reopened(saved).tokens, now)


def test_a_torn_record_leaves_the_one_before(saved, text):
    cache = OffloadedStaticCache.open(CONFIG, saved)
    fill(cache, text[:, :20], LENGTH)
    cache.save(torch.cat([text, text[:, :20]], 1))
    # The second record is in the first slot.
    with open(saved, "r+b") as file:
        file.seek(4096 + 60)
        file.write(b"\0")
    assert int(reopened(saved).get_seq_length()) == LENGTH


def test_a_file_that_was_never_saved_is_deleted_or_taken_over(tmp_path, text):
    path = tmp_path / "book.kv"
    Path(f"{path}.unsaved").write_bytes(b"left by a killed process")
    cache = new(path)
    fill(cache, text)
    assert not path.exists()
    with pytest.raises(FileNotFoundError, match=f"path: cannot open {re.escape(str(path))}"):
        OffloadedStaticCache.open(CONFIG, path)
    cache.close()
    assert not list(tmp_path.iterdir())


def truncated(path):
    os.truncate(path, path.stat().st_size - 1000)


def zeroed(layer, name):
    def damage(path):
        file = CacheFile.open(str(path))
        record = Record.from_bytes(file.read_record(), str(path))
        file.map(record.layers[layer].regions[name]).zero_()
        file.close()

    return damage


def with_zeros(offset, size):
    def damage(path):
        with open(path, "r+b") as file:
            file.seek(offset)
            file.write(bytes(size))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, r"truncated: \d+ bytes of \d+"),
        (lambda path: os.truncate(path, 3000), "damaged: it has no whole record"),
        (lambda path: path.write_bytes(b""), "is not the file of a cache"),
        (lambda path: path.write_text("Call me Ishmael. " * 999), "is not the file of a cache"),
        (with_zeros(16, 1), "has version 0 of the format, this reads 1"),
        (with_zeros(4096, 2**21), "damaged: it has no whole record"),
        (zeroed(0, "values"), "damaged: a checksum is wrong"),
        (zeroed(2, "summary"), "damaged: a checksum is wrong"),
    ],
)
def test_what_is_not_whole_is_refused_in_a_line(damage, message, saved):
    damage(saved)
    with pytest.raises(ValueError, match=message) as caught:
        OffloadedStaticCache.open(CONFIG, saved)
    assert str(saved) in str(caught.value) and "\n" not in str(caught.value)


def test_of_another_model_is_refused_and_says_what_differs(saved):
    other = transformers.LlamaConfig(**CONFIG.to_dict() | {"rope_parameters": {"rope_theta": 5.0}})
    with pytest.raises(ValueError, match="config: .*book.kv is of another model, with rope_"):
        OffloadedStaticCache.open(other, saved)
    same = transformers.LlamaConfig(**CONFIG.to_dict() | {"use_cache": False, "pad_token_id": 7})
    OffloadedStaticCache.open(same, saved)


def test_of_other_weights_is_refused_where_both_are_known(tmp_path, text):
    one, other = (transformers.LlamaForCausalLM(CONFIG) for _ in range(2))
    cache = new(tmp_path / "book.kv", model=one)
    fill(cache, text)
    cache.save()
    cache.close()
    with pytest.raises(
        ValueError, match="model: .*book.kv is of a model with other weights or dtype"
    ):
        OffloadedStaticCache.open(CONFIG, tmp_path / "book.kv", model=other)
    OffloadedStaticCache.open(CONFIG, tmp_path / "book.kv", model=one).close()


def test_of_other_tokens_is_refused_and_says_where(saved, text):
    longer = torch.cat([text, text], 1)
    OffloadedStaticCache.open(CONFIG, saved, tokens=longer).close()
    longer[0, 70] += 1
    with pytest.raises(ValueError, match="100 tokens that at position 70 is the first to differ"):
        OffloadedStaticCache.open(CONFIG, saved, tokens=longer)
    with pytest.raises(ValueError, match=r"tokens: expected the \[1, 100\] .* got \[1, 99\]"):
        OffloadedStaticCache.open(CONFIG, saved, tokens=text[:, :99])


def test_saved_without_tokens_it_opens_without(tmp_path, text):
    cache = new(tmp_path / "book.kv")
    fill(cache, text)
    cache.save()
    with pytest.raises(ValueError, match="was saved without tokens"):
        reopened(tmp_path / "book.kv", tokens=text)
    assert int(reopened(tmp_path / "book.kv").get_seq_length()) == LENGTH


def test_two_cannot_have_it_at_once(saved, tmp_path):
    cache = OffloadedStaticCache.open(CONFIG, saved)
    with pytest.raises(BlockingIOError, match="book.kv is in use, by another process"):
        OffloadedStaticCache.open(CONFIG, saved)
    making = new(tmp_path / "other.kv")
    with pytest.raises(BlockingIOError, match="other.kv.unsaved is in use"):
        new(tmp_path / "other.kv")
    cache.close(), making.close()
    OffloadedStaticCache.open(CONFIG, saved).close()


def test_a_path_that_cannot_be_is_named_before_anything_is_read(saved, tmp_path):
    with pytest.raises(
        FileExistsError, match="path: .*book.kv exists: .*OffloadedStaticCache.open"
    ):
        new(saved)
    with pytest.raises(FileNotFoundError, match="path: cannot make .*no/book.kv.unsaved"):
        new(tmp_path / "no" / "book.kv")
    with pytest.raises(OSError, match="path: cannot make /proc/book.kv.unsaved"):
        new("/proc/book.kv")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="path: cannot make .*book.kv.unsaved: Permission"):
        new(tmp_path / "book.kv")


def test_a_full_disk_is_found_with_the_first_tokens(tmp_path, text):
    cache = new(tmp_path / "book.kv")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(OSError, match=r"too large: .*book.kv.unsaved needs \d{7} bytes"):
            fill(cache, text)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    fill(cache, text)
    cache.save(text)
    assert int(reopened(tmp_path / "book.kv").get_seq_length()) == LENGTH


def test_a_process_with_less_memory_than_its_cache_decodes_the_same_tokens(tmp_path):
    def decoded(kind, limit):
        command = [sys.executable, limited_decoder, kind, str(limit), str(tmp_path / "book.kv")]
        path = os.pathsep.join(filter(None, sys.path))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    limit = CACHE_BYTES // 2
    found, expected, failed = decoded("file", limit), decoded("memory", 0), decoded("memory", limit)
    assert found.returncode == expected.returncode == 0, found.stderr + expected.stderr
    assert len(found.stdout.split()) == 8 and found.stdout == expected.stdout
    assert failed.returncode != 0 and "allocate memory" in failed.stderr
