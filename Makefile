# `make test` and `make demo` are all that a fresh machine needs: Python 3.11 or newer with its venv module, and a C++
# compiler for Inductor. Both make .venv from pinned versions first; that happens once.
#
#   make PYTHON=python3.12 test    another interpreter
#   make test PYTEST="-x -k axes"  arguments for pytest
#   make demo SHORT=1              a demo of about a minute

PYTHON ?= python3
TORCH  := 2.13.0
TRITON := 3.6.0
PYTEST ?= -n 2 --dist worksteal
VENV   := .venv
RUN    := $(VENV)/bin/python
READY  := $(VENV)/ready
TYPES  := build/types

.PHONY: test lint types pytest test-full coverage demo wheel clean

test: lint types pytest

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# passes/ and kernels/ are parts of flashdp_compile under other folders, which mypy cannot follow: show it one tree.
types: $(READY)
	@rm -rf $(TYPES) && mkdir -p $(TYPES)/flashdp_compile
	@ln -s $(CURDIR)/flashdp_compile/* $(CURDIR)/passes $(CURDIR)/kernels $(TYPES)/flashdp_compile/
	cd $(TYPES) && $(CURDIR)/$(RUN) -m mypy --config-file $(CURDIR)/pyproject.toml -p flashdp_compile

pytest: $(READY)
	$(RUN) -m pytest $(PYTEST)

# test-full: also the whole models that are near relatives of others; coverage: the pages of what the tests find
test-full: $(READY)
	$(RUN) -m pytest $(PYTEST) -m "not whole_zoo"

coverage: $(READY)
	rm -f docs/coverage/*-cpu.jsonl
	FLASHDP_COVERAGE=docs/coverage $(RUN) -m pytest $(PYTEST) -m "full or not full" -k "not page" tests/libraries \
		tests/test_exactness.py tests/test_adversarial.py tests/test_modes.py tests/generate/test_generated_layers.py \
		--deselect tests/generate/test_generated_layers.py::test_more_of_them
	PYTHONPATH=.:tests $(RUN) -m libraries.coverage
	PYTHONPATH=.:tests $(RUN) -m zoo.coverage

demo: $(READY)
	$(RUN) examples/demo.py $(if $(SHORT),--short)

wheel: $(READY)
	$(RUN) -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

# torch comes first and alone, so that nothing else decides its version. A torch with CUDA brings the Triton that
# belongs to it; one without brings none, and the tests run kernels in the interpreter of the pinned one.
$(READY): requirements.txt pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "flashdp_compile needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint requirements.txt torch==$(TORCH)
	@$(RUN) -m pip show --quiet triton 2>/dev/null || $(RUN) -m pip install --quiet --no-deps triton==$(TRITON)
	$(RUN) -m pip install --quiet --requirement requirements.txt
	$(RUN) -m pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info demo_output
