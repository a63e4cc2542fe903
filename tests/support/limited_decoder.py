"""``python limited_decoder.py memory|file LIMIT PATH``: tokens decoded behind a long context.

LIMIT: bytes of memory of its own that the process may add once it has imported everything and made
the model; 0: as much as it likes. Memory mapped from files does not count.
"""

import resource
import sys

import torch
import transformers
from tiny_models import tiny_model

import quest_compile
from quest_compile import ops
from quest_compile.decoding import greedy_step, rewind

LENGTH = 48 * 1024
PART = 4096
# Keys and values, 2 heads of 16 channels in float32.
NUM_LAYERS = 8
CACHE_BYTES = NUM_LAYERS * 2 * 2 * 16 * 4 * LENGTH


def own_memory():
    with open("/proc/self/status", encoding="utf-8") as lines:
        (line,) = (line for line in lines if line.startswith("VmData:"))
    return int(line.split()[1]) * 1024


def in_file(model, path):
    return quest_compile.OffloadedStaticCache(
        model.config, LENGTH + 64, path=path, num_dense_layers=0
    )


def main(kind, limit, path):
    torch.set_num_threads(1)
    model = tiny_model("llama", num_hidden_layers=NUM_LAYERS, max_position_embeddings=2 * LENGTH)
    settings = {"budget": 128, "num_dense_layers": 0, "inner": "eager", "strict": True}
    step = torch.compile(model, backend=quest_compile.backend(**settings))
    # What compiling takes is there before the limit.
    warm = in_file(model, f"{path}.warm")
    with torch.no_grad():
        model(torch.ones(1, 300, dtype=torch.int64), past_key_values=warm)
        greedy_step(step, warm, torch.ones(1, 1, dtype=torch.int64), 300)
    if limit:
        most = own_memory() + limit
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    if kind == "memory":
        cache = transformers.StaticCache(config=model.config, max_cache_len=LENGTH + 64)
    else:
        cache = in_file(model, path)
    generator = torch.Generator().manual_seed(0)
    for _ in range(0, LENGTH, PART):
        for layer in range(NUM_LAYERS):
            keys, values = torch.randn(2, 1, 2, PART, 16, generator=generator)
            cache.update(keys, values, layer)
    ops.reset_counters()
    token, tokens = torch.ones(1, 1, dtype=torch.int64), []
    with torch.no_grad():
        for position in range(LENGTH, LENGTH + 8):
            token = greedy_step(step, cache, token, position)
            tokens.append(int(token))
    assert ops.counters()["sparse_calls"] == 8 * NUM_LAYERS, ops.counters()
    if kind == "file":
        cache.save()
        cache.close()
        cache = quest_compile.OffloadedStaticCache.open(model.config, path)
        rewind(cache, LENGTH)
        with torch.no_grad():
            token = greedy_step(step, cache, torch.ones(1, 1, dtype=torch.int64), LENGTH)
        assert int(token) == tokens[0]
    print(*tokens)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
