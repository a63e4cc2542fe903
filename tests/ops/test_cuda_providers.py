"""Which kernels serve CUDA tensors, decided and announced without a GPU."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from hostile import Case, make_inputs

from quest_compile import ops
from quest_compile.ops import cuda_providers, native, reference


@pytest.mark.parametrize(
    ("wanted", "has_native", "triton", "expected"),
    [
        ("", True, "3.7.1", "native"),
        ("", False, "3.7.1", "triton"),
        ("", False, "", "torch"),
        ("", True, "", "native"),
        ("native", True, "3.7.1", "native"),
        ("native", False, "3.7.1", "torch"),
        ("triton", True, "3.7.1", "triton"),
        ("triton", True, "", "torch"),
        ("torch", True, "3.7.1", "torch"),
    ],
)
def test_native_first_then_triton_then_torch(wanted, has_native, triton, expected, monkeypatch):
    monkeypatch.setattr(cuda_providers, "_triton_version", lambda: triton)
    assert cuda_providers._choose("score_pages", wanted, has_native) == expected


def test_every_operator_with_kernels_has_a_provider():
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for name, operator in ops.OPERATORS.items():
        provider = ops.provider_of(name)
        assert provider in (
            ("native", "triton", "torch") if "cuda" in operator.kernels else ("torch",)
        )
        assert has_kernel(f"quest::{name}", "CUDA") == (provider != "torch")


@pytest.mark.parametrize("wanted", ["torch", "triton", ""])
def test_variable_chooses_and_triton_is_not_imported(wanted):
    code = (
        "import sys; from quest_compile import ops; "
        "print(ops.provider_of('dense_decode'), 'triton' in sys.modules, ops.cuda_kernels())"
    )
    variables = os.environ | {"QUEST_COMPILE_CUDA_KERNELS": wanted}
    out = subprocess.check_output([sys.executable, "-W", "ignore", "-c", code], env=variables)
    provider, is_imported, text = out.decode().split(maxsplit=2)
    assert is_imported == "False"
    assert provider == (wanted or ops.provider_of("dense_decode"))
    assert text.startswith({"native": "native", "triton": "triton", "torch": "torch"}[provider])


def test_unknown_value_of_the_variable_is_named():
    done = subprocess.run(
        [sys.executable, "-c", "import quest_compile"],
        env=os.environ | {"QUEST_COMPILE_CUDA_KERNELS": "fast"},
        capture_output=True,
        text=True,
    )
    message = "QUEST_COMPILE_CUDA_KERNELS: expected one of native, triton, torch, got 'fast'"
    assert message in done.stderr


class Kernels:
    """In place of the module of the Triton launchers."""

    def __init__(self):
        self.calls = []

    def score_pages(self, *arguments, **settings):
        self.calls.append(arguments)
        return reference.score_pages(*arguments, **settings)


def score(inputs):
    call = cuda_providers.triton_operator("score_pages")
    return call(inputs.query, inputs.page_summary, inputs.seq_lens)


@pytest.fixture
def inputs(monkeypatch):
    monkeypatch.setattr(native, "_announced", set())
    return make_inputs(Case())


def test_kernels_get_checked_arguments_in_full(inputs, monkeypatch):
    kernels = Kernels()
    monkeypatch.setattr(cuda_providers, "_import_triton_kernels", lambda: (kernels, ""))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score(inputs)
    ((*_, attn_mask),) = kernels.calls
    assert len(kernels.calls[0]) == 4 and attn_mask is None
    with pytest.raises(ValueError, match="page_summary: expected"):
        cuda_providers.triton_operator("score_pages")(
            inputs.query, inputs.page_summary[..., :8], inputs.seq_lens
        )


def test_where_triton_does_not_load_torch_serves_and_that_is_said_once(inputs, monkeypatch):
    why = "it does not load"
    monkeypatch.setattr(cuda_providers, "_import_triton_kernels", lambda: (None, why))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            scores = score(inputs)
    expected = reference.score_pages(inputs.query, inputs.page_summary, inputs.seq_lens)
    assert torch.equal(scores, expected)
    slow = [str(w.message) for w in caught if issubclass(w.category, ops.NativeLibraryWarning)]
    assert len([text for text in slow if why in text and "quest::score_pages" in text]) == 1
