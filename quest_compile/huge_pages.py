"""Huge memory pages for the key-value caches and page summaries of a CPU.

A page of keys is about as large as a page of memory, 4 KB, so every selected page costs at least
one miss of the TLB. In pages of 2 MB that cost is gone. Linux gives them to whoever asks by
``madvise``.
"""

from __future__ import annotations

import ctypes
import os
import sys

import torch

_VARIABLE = "QUEST_COMPILE_HUGE_PAGES"
_HUGE_PAGE = 2 * 2**20
# <linux/mman.h>; MADV_COLLAPSE came with Linux 6.1.
_MADV_HUGEPAGE = 14
_MADV_COLLAPSE = 25


def use_huge_pages(tensor: torch.Tensor) -> bool:
    """Ask Linux to keep the memory of ``tensor`` in huge pages, what it already holds included.

    Takes about 0.1 s for 256 MB, several times that where memory is fragmented. Compiled models do
    it for caches and page summaries when they first see them; call it yourself for tensors that you
    give to ``torch.ops.quest``.

    Returns:
        Whether Linux did. False, without harm, on other systems and devices, for tensors that hold
        no whole huge page, for memory of a file (each of its faults would read 2 MB), where the
        administrator forbids it, and with the environment variable
        ``QUEST_COMPILE_HUGE_PAGES=0``.
    """
    if os.environ.get(_VARIABLE) == "0" or sys.platform != "linux" or tensor.device.type != "cpu":
        return False
    storage = tensor.untyped_storage()
    begin = -(-storage.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    end = (storage.data_ptr() + storage.nbytes()) // _HUGE_PAGE * _HUGE_PAGE
    if begin >= end or _is_of_file(begin, end):
        return False
    madvise = ctypes.CDLL(None).madvise
    where = (ctypes.c_void_p(begin), ctypes.c_size_t(end - begin))
    return madvise(*where, _MADV_HUGEPAGE) == 0 and madvise(*where, _MADV_COLLAPSE) == 0


def _is_of_file(begin: int, end: int) -> bool:
    """Whether a part of [begin, end) is mapped from a file."""
    with open("/proc/self/maps", encoding="utf-8") as lines:
        for line in lines:
            addresses, *_, inode = line.split(None, 5)[:5]
            first, last = (int(x, 16) for x in addresses.split("-"))
            if first < end and begin < last and inode != "0":
                return True
    return False
