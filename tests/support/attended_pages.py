"""Which pages are attended: by quest::sparse_decode, whatever serves it, or in plain torch."""

import contextlib

import pytest
import torch

from quest_compile.eval import baselines

_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


@contextlib.contextmanager
def recorded_pages():
    """A list that gets, per call of the operator on the CPU, bool [num_q_heads, num_pages].

    The call itself runs too. Values are NaN in one channel for one page: channel d of the output is
    NaN if, and only if, page d was attended; as many calls as it takes for all pages.
    """
    kernel = torch.library.get_kernel("quest::sparse_decode", "CPU")
    found = []

    def record(query, key_cache, value_cache, *rest, page_size=16, **settings):
        arguments = {"page_size": page_size, **settings}

        def call(values):
            return kernel.call_boxed(_CPU, query, key_cache, values, *rest, **arguments)

        marked = [call(values)[0, :, 0].isnan() for values in _marks(value_cache, page_size)]
        num_pages = -(-value_cache.shape[2] // page_size)
        found.append(torch.cat(marked, -1)[:, :num_pages])
        return call(value_cache)

    library = torch.library.Library("quest", "IMPL")
    library.impl("sparse_decode", record, "CPU", allow_override=True)
    try:
        yield found
    finally:
        library._destroy()


@contextlib.contextmanager
def kept_pages():
    """The same list, of the method quest-reference."""
    rule, found = baselines.quest_reference, []

    def record(step):
        keep = rule(step)
        page_size, num_q_heads = step.config.page_size, step.query.shape[1]
        pages = keep[0].unflatten(-1, (-1, page_size)).any(-1)
        found.append(pages.repeat_interleave(num_q_heads // len(pages), 0))
        return keep

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(baselines.KEEP, "quest-reference", record)
        yield found


def _marks(value_cache, page_size):
    max_seq_len, num_channels = value_cache.shape[2:]
    page = torch.arange(max_seq_len) // page_size
    for first in range(0, int(page[-1]) + 1, num_channels):
        marked = page[:, None] == first + torch.arange(num_channels)
        marks = torch.zeros(marked.shape).masked_fill(marked, torch.nan)
        yield marks.to(value_cache.dtype).expand_as(value_cache).contiguous()
