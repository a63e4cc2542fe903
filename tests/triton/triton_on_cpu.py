"""A pytest plugin: the Triton kernels serve CPU tensors, in Triton's interpreter.

TRITON_INTERPRET=1 has to be set before triton is imported, so this runs in processes of its own.
QUEST_TRITON_CASES=all: the cases of hostile.py as they are, instead of few and small ones.
"""

import os

import hostile
import pytest
import torch
from hostile import Case

from quest_compile import ops
from quest_compile.ops import OPERATORS, cuda_providers
from quest_compile.ops.settings import SummaryFormat
from quest_compile.ops.summaries import SUMMARIES

_F32, _BF16, _F16 = hostile.DTYPES
SMALL_CASES = hostile.in_turn(
    Case(_BF16, 32, 64, 1, 4, 16, (150,), 160),
    Case(_F32, 8, 8, 2, 1, 8, (1,), 1),
    Case(_BF16, 24, 24, 2, 2, 8, (15, 1, 40), 64, "gaps", "row"),
    Case(_F16, 32, 32, 1, 3, 16, (70,), 71, "tokens_first", "random", 3),
    Case(_F16, 16, 16, 1, 2, 24, (90, 23), 90, "tokens_first", "per_head"),
    Case(_F32, 40, 24, 1, 4, 16, (17, 90), 95, "gaps", "left_padding"),
    Case(_F16, 16, 8, 2, 1, 16, (90, 81), 97, "plain", "nothing"),
    Case(_BF16, 16, 16, 1, 2, 8, (60, 70), 73, "tokens_first", "dead_pages", 5),
)


def summarise(inputs):
    """In plain torch: rows have tests of their own, and take the interpreter long."""
    page_format = SummaryFormat(**inputs.case.page_format())
    keys, page_size = inputs.key_cache, page_format.page_size
    num_pages = keys.shape[2] // page_size
    pages = keys[:, :, : num_pages * page_size].unflatten(2, (num_pages, page_size))
    rows = SUMMARIES[page_format.summary].build(pages, page_format)
    inputs.page_summary = ops.empty_page_summary(keys, **inputs.case.page_format())
    inputs.page_summary[:, :, :num_pages] = rows


def pytest_configure():
    hostile.Inputs.summarise = summarise
    if os.environ.get("QUEST_TRITON_CASES") != "all":
        hostile.CASES = SMALL_CASES
        hostile.every_case = pytest.mark.parametrize("case", SMALL_CASES, ids=str)
    library = torch.library.Library("quest", "IMPL", "CPU")
    for name, operator in OPERATORS.items():
        if "cuda" in operator.kernels:
            library.impl(name, cuda_providers.triton_operator(name))
    cuda_providers._libraries.append(library)
