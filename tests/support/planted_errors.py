"""Run as a program in a process with sanitizers: makes the kernels do what only those notice.

Tensors made of these arrays claim memory that is not theirs.
"""

import sys

import numpy as np
import torch

from quest_compile import ops


def overrun():
    """The last token of the last head of a cache lies behind its memory."""
    memory = np.zeros((2, 127, 64), dtype=np.float32)
    shape = (1, 2, 128, 64)
    strides = (memory.nbytes, 127 * 256, 256, 4)
    cache = torch.from_numpy(np.lib.stride_tricks.as_strided(memory, shape, strides))
    query = torch.zeros(1, 4, 1, 64)
    ops.dense_decode(query, cache, cache, torch.tensor([127]))
    print("before", flush=True)
    ops.dense_decode(query, cache, cache, torch.tensor([128]))


def misaligned():
    """Lengths at an odd address."""
    lengths = np.frombuffer(bytearray(32), dtype=np.int64, offset=1, count=1)
    lengths[:] = 64
    cache = torch.zeros(1, 2, 128, 64)
    query = torch.zeros(1, 4, 1, 64)
    print("before", flush=True)
    ops.dense_decode(query, cache, cache, torch.from_numpy(lengths))


if __name__ == "__main__":
    {"overrun": overrun, "misaligned": misaligned}[sys.argv[1]]()
    print("not noticed")
