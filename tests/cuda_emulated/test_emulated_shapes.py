"""Shapes of models by the CUDA kernels in emulation.

CI runs this file under sanitizers: all kernels are in it, in one dtype.
"""

# ruff: noqa: F401 - tests run where they are imported.
import dataclasses

import pytest
import torch
from emulated_library import configure
from hostile import every_format, make_inputs
from test_every_op import assert_same_bits
from test_model_shapes import (
    shapes,
    test_a_row_of_many_has_the_bits_that_it_has_alone,
    test_a_step_summarises_as_the_reference_and_attends_the_pages_selected,
    test_scores_pages_and_attention,
)
from test_sparse_decode_step import assert_same_state, state_of, step

# One CTA for all pages and tokens of a head, and several whose parts are merged.
GPUS = ({"num_sms": 1}, {"num_sms": 132, "seed": 1}, {"num_sms": 8, "seed": 2})


@every_format
@shapes
def test_every_gpu_gives_the_same_bits(case, page_format):
    """Also behind a write by others."""
    inputs = make_inputs(dataclasses.replace(case, **page_format))
    last = inputs.seq_lens.max()[None] - 1
    found = []
    for settings in GPUS:
        keys = inputs.key_cache.clone()
        inputs.key_cache.nan_to_num_(0)
        state = state_of(inputs, 0, -1)
        configure(**settings)
        outs = [step(inputs, last - 1, state)]
        inputs.key_cache[-1] *= -3
        outs.append(step(inputs, last, state))
        assert configure() == 2 * 2
        inputs.key_cache.copy_(keys)
        found.append((outs, state))
    for outs, state in found[1:]:
        assert_same_bits(outs, found[0][0])
        assert_same_state(state, found[0][1])
