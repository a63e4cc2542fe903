"""The reference as it runs on devices other than the CPU, without one."""

from unittest import mock

import pytest
import torch
from hostile import CASES, WAYS, make_inputs
from test_every_op import NAMES, call_of
from torch._subclasses.fake_tensor import FakeTensorMode

from quest_compile.ops import reference

names = pytest.mark.parametrize("name", NAMES)


def results(name, arguments, settings):
    """Outputs; for the op that writes in place, the summaries that it says are up to date."""
    function = getattr(reference, name)
    if name == "update_page_summary":
        keys, positions, page_summary, num_sealed = (x.clone() for x in arguments)
        function(keys, positions, page_summary, num_sealed, **settings)
        return (page_summary[:, :, : int(num_sealed)].contiguous(),)
    out = function(*arguments, **settings)
    return out if isinstance(out, tuple) else (out,)


@names
@pytest.mark.parametrize("case", CASES[: len(WAYS)], ids=str)
def test_gives_the_same_where_it_must_not_look_at_values_and_never_waits_for_them(name, case):
    """A fake tensor raises when its value is asked for."""
    arguments, settings = call_of(name, make_inputs(case))
    expected, *_ = results(name, arguments, settings)
    with mock.patch.object(torch.Tensor, "is_cpu", False):
        actual, *_ = results(name, arguments, settings)
    assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))
    with FakeTensorMode() as mode, mock.patch.object(torch.Tensor, "is_cpu", False):
        fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments]
        getattr(reference, name)(*fakes, **settings)
