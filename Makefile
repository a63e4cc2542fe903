# Works on a bare machine: every target first makes a virtual environment with the versions pinned
# in pyproject.toml and builds the package into it. The second time only what changed is built.
PYTHON ?= $(shell for p in python3.11 python3 python; do \
  $$p -c '' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
PIP := -m pip install --quiet --disable-pip-version-check
# Inductor compiles C++ on CPU.
MARKS := not nightly$(if $(shell command -v c++ || command -v clang++ || command -v $(CXX)),, and not inductor)
# One thread per process: the processes share the cores.
PYTEST := OMP_NUM_THREADS=1 PYTHONSAFEPATH=1 $(BIN)/python -m pytest -n $(JOBS) -m '$(MARKS)'
TRANSFORMERS := 5.23.0 4.57.6
# It says more than a page when transformers imports it, so $(VENV) has none.
TORCHAO := torchao-0.18.0

# torch and the build tools come before the package, which is built against the installed torch.
TOOLCHAIN := $(shell \
  sed -nE 's/^ *"((torch|scikit-build-core|cmake|ninja)==[^";]*)".*/\1/p' pyproject.toml)
NATIVE_SOURCES := $(shell find csrc cmake -type f -not -name '*.pyc' 2>/dev/null)
INSTALLED := $(VENV)/installed.stamp
SITE_PACKAGES := import sysconfig; print(sysconfig.get_path('purelib'))
NATIVE_STATUS := from quest_compile.ops.native import native_status as s; \
  print('Native library:', s().info if s().loaded else 'none: ' + s().reason)

HAS_CUDA := $(if $(filter 0,$(QUEST_COMPILE_CUDA)),,$(shell command -v nvcc))
CUDA_TIME := $(if $(HAS_CUDA),; CUDA kernels: some more (QUEST_COMPILE_CUDA=0: none))

.DEFAULT_GOAL := help
.PHONY: help install demo real-model quick test test-nightly test-real-model test-no-native test-sanitizers test-transformers test-torchao lint format bench clean distclean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' Makefile

install: $(INSTALLED) ## make .venv and build the package into it (editable)

demo: $(INSTALLED) ## a small real model reads a book: dense against Quest (ARGS=--recall: no network)
	$(BIN)/quest-compile demo $(ARGS)

real-model: $(INSTALLED) ## get a really trained small model (93 MB), for --model smollm2
	$(BIN)/quest-compile fetch smollm2

quick: $(INSTALLED) ## run the tests of the inner loop: operators, passes, backend (two minutes)
	$(PYTEST) --dist loadfile -m '$(MARKS) and not slow and not inductor' tests/ops tests/passes \
	  tests/test_backend.py tests/test_budgets.py $(ARGS)

test: $(INSTALLED) ## run all tests (pytest options in ARGS; those of a web page need chromium)
	$(PYTEST) --dist loadfile $(ARGS)

test-nightly: $(INSTALLED) ## run the long forms of randomised tests, and soaks (an hour)
	$(PYTEST) -m nightly --dist worksteal $(ARGS)

test-real-model: real-model ## run the tests on the really trained model (nightly, some minutes)
	$(PYTEST) -n 0 -m real_model $(ARGS)

test-no-native: $(INSTALLED) ## run the operator tests on the plain-torch reference
	QUEST_COMPILE_NATIVE=0 $(PYTEST) --dist loadfile tests/ops $(ARGS)

test-sanitizers: $(INSTALLED) ## run kernels, CUDA ones in emulation, under ASan and UBSan
	$(PYTEST) -n 0 -m '' tests/test_sanitizers.py tests/cuda_emulated/test_emulated_sanitized.py $(ARGS)

test-transformers: $(TRANSFORMERS:%=test-transformers-%) ## run the model tests with other versions

test-transformers-%: $(VENV)-with-transformers-%/installed.stamp
	$(subst $(BIN),$(<D)/bin,$(PYTEST)) tests/test_models.py \
	  tests/test_model_matrix.py tests/test_state_machine.py $(if $(filter 5.%,$*),tests/test_warmup.py) $(ARGS)

test-torchao: $(VENV)-with-$(TORCHAO)/installed.stamp ## run the tests of quantised weights
	$(subst $(BIN),$(<D)/bin,$(PYTEST)) -n 0 tests/test_quantize.py $(ARGS)

lint: $(INSTALLED) ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(INSTALLED) ## rewrite Python and C++ in the project's style
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \
	  | xargs $(BIN)/clang-format -i

bench: $(INSTALLED) ## time decode attention: Quest, dense and torch
	$(BIN)/quest-compile bench ops $(ARGS)

clean: ## remove what was built, keep the virtual environments
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis $(INSTALLED)
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean ## remove the virtual environments too
	rm -rf $(VENV) $(VENV)-with-*

# bin/pip is the last thing venv writes: an interrupted run is started again.
$(BIN)/pip:
	@echo '[1/3] Making $(VENV): some seconds'
	@$(PYTHON) -m venv $(VENV) || $(PYTHON) -m virtualenv $(VENV)

$(VENV)/toolchain.stamp: pyproject.toml | $(BIN)/pip
	@echo '[2/3] Installing $(TOOLCHAIN): a few minutes the first time'
	@$(BIN)/python $(PIP) $(TOOLCHAIN)
	@touch $@

$(INSTALLED): $(VENV)/toolchain.stamp CMakeLists.txt $(NATIVE_SOURCES)
	@echo '[3/3] Building quest_compile, installing what tests need: a few minutes$(CUDA_TIME)'
	@$(BIN)/python $(PIP) --no-build-isolation -e '.[dev]'
	@$(BIN)/python -c "$(NATIVE_STATUS)"
	@touch $@

# An environment that sees everything in $(VENV), the editable package included, but has its own
# version of a package (with a "-" before the version), and what that needs.
$(VENV)-with-%/installed.stamp: $(INSTALLED)
	$(BIN)/python -m venv --without-pip $(@D)
	echo "import site; site.addsitedir('$$($(BIN)/python -c "$(SITE_PACKAGES)")')" \
	  > "$$($(@D)/bin/python -c "$(SITE_PACKAGES)")/base.pth"
	$(@D)/bin/python $(PIP) $(subst -,==,$*)
	@touch $@

.SECONDARY:
