"""``python killed_writers.py FOLDER TIMES SEED``: processes that write and save a cache in a file,
each killed at a random moment; what their files are then, as JSON.

They are forks of this one, which has imported everything. Keys and values follow from the token and
its position: of what a file says it holds, every bit can be checked.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import transformers

import quest_compile
from quest_compile import ops

MAX_SEQ_LEN = 160
CONFIG = transformers.LlamaConfig(
    hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3
)
PAGE_FORMAT = ops.SummaryFormat()


def states_of(tokens, position, layer):
    """Keys of tokens [1, n]; the values are their negative."""
    numbers = tokens[0].double() * 1.7 + torch.arange(position, position + tokens.shape[1]) * 0.37
    return torch.sin(numbers[:, None] * torch.arange(1, 33).reshape(2, 1, 16) + layer)[None].float()


def write(path, seed):
    """Forever: append, save, go back, begin anew."""
    rng, torch_rng = random.Random(seed), torch.Generator().manual_seed(seed)
    cache = quest_compile.OffloadedStaticCache(CONFIG, MAX_SEQ_LEN, path=path, num_dense_layers=1)
    text = torch.zeros(1, 0, dtype=torch.int64)
    while True:
        what = rng.random()
        if what < 0.05:
            cache.reset()
            text = text[:, :0]
        elif what < 0.15 and text.shape[1]:
            text = text[:, : rng.randrange(text.shape[1])]
            for layer in cache.layers:
                layer.cumulative_length.fill_(text.shape[1])
        elif what < 0.5 and text.shape[1]:
            cache.save(text)
        elif (room := MAX_SEQ_LEN - text.shape[1]) > 0:
            num = rng.randint(1, min(room, 40))
            new = torch.randint(0, 1000, (1, num), generator=torch_rng)
            for layer in range(3):
                keys = states_of(new, text.shape[1], layer)
                cache.update(keys, -keys, layer)
            text = torch.cat([text, new], 1)


def what_is_left(path):
    """ "opened", or why not: "nothing" was saved, or "withdrawn".

    Raises:
        AssertionError: it opens and is wrong.
        Exception: whatever else it is.
    """
    try:
        cache = quest_compile.OffloadedStaticCache.open(CONFIG, path)
    except FileNotFoundError:
        return "nothing"
    except ValueError as error:
        if "in front of the end" not in str(error):
            raise
        return "withdrawn"
    length = cache.tokens.shape[1]
    for index, layer in enumerate(cache.layers):
        keys = states_of(cache.tokens, 0, index)
        assert int(layer.cumulative_length) == length
        assert torch.equal(layer.keys[:, :, :length], keys)
        assert torch.equal(layer.values[:, :, :length], -keys)
        if index:
            lengths = torch.tensor([length])
            expected = ops.build_page_summary(layer.keys, lengths, **PAGE_FORMAT.as_kwargs())
            found = layer.keys._quest_page_summaries[PAGE_FORMAT]
            num_sealed = length // PAGE_FORMAT.page_size
            assert int(found.num_sealed[0]) == num_sealed
            assert torch.equal(found.page_summary[:, :, :num_sealed], expected[:, :, :num_sealed])
    return "opened"


def killed(path, seed):
    pid = os.fork()
    if pid == 0:
        try:
            write(path, seed)
        finally:
            os._exit(1)
    time.sleep(random.Random(seed).uniform(0, 0.3))
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), "the writer failed before it was killed"


def main(folder, times, seed):
    torch.set_num_threads(1)
    found = {}
    for i in range(times):
        path = Path(folder) / f"{i}.kv"
        killed(path, seed + i)
        left = what_is_left(path)
        found[left] = found.get(left, 0) + 1
        # What was left goes on, or begins anew.
        for name in (path, f"{path}.unsaved"):
            if os.path.exists(name):
                os.unlink(name)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
