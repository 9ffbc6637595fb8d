# make bench | make test set up a virtual environment in .venv and everything in it by themselves.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
OUT ?= out
PART ?= all
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml
CLANG_FILES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
PYTEST := -m pytest tests

.PHONY: bench test lint docs gpu gpu-test gpu-bench check-abi wheel wheel-smoke clean
.DELETE_ON_ERROR:

bench: $(VENV)/built
	$(PY) -m bench

test: $(VENV)/built
	$(PY) $(PYTEST) -n 2

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CLANG_FILES)
	$(VENV)/bin/pyright

# The pages that are generated from measured results.
docs: $(VENV)/built
	$(PY) $(PYTEST)/test_contract.py -n 0 -q -k test_error_ratio --numerics docs/numerics.md
	$(PY) -m bench --docs docs/performance.md

# The dependencies, then dlops itself against the torch just installed: no second torch for an isolated build.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q "torch>=2.11"
	$(PY) tests/requirements.py | xargs -d '\n' $(PY) -m pip install -q
	touch $@

$(VENV)/built: $(VENV)/installed $(SOURCES)
	$(PY) -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

# On a machine with a GPU and no network, in the Python that has everything: builds in place, tests natively, measures.
gpu: $(if $(filter all,$(PART)),gpu-test gpu-bench,gpu-$(PART))

gpu-build:
	$(PYTHON) setup.py -q build_ext --inplace
	$(PYTHON) -m pip install -q --no-build-isolation --no-deps -e . || $(PYTHON) -m pip install -q --no-build-isolation --no-deps --target $(OUT)/site .

gpu-test: gpu-build
	mkdir -p $(OUT)
	$(PYTHON) $(PYTEST) -q -n 4 --junit-xml=$(OUT)/tests.xml

gpu-bench: gpu-build
	mkdir -p $(OUT)
	$(PYTHON) -m bench --json $(OUT)/bench.json

# The newest torch's build, run under the oldest torch that is supported.
check-abi: wheel .venv-oldest/installed
	.venv-oldest/bin/python -m pip install -q --no-deps --force-reinstall dist/dlops-*.whl
	cd / && $(CURDIR)/.venv-oldest/bin/python $(CURDIR)/tests/smoke.py

.venv-oldest/installed:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -q "torch==2.11.*" numpy
	touch $@

wheel: $(VENV)/installed
	rm -rf dist
	$(PY) -m pip wheel -q --no-deps --no-build-isolation -w dist .

# As a user: an isolated build, a clean environment, another folder.
wheel-smoke:
	rm -rf dist .venv-smoke
	$(PYTHON) -m venv .venv-smoke
	.venv-smoke/bin/python -m pip wheel -q --no-deps -w dist .
	.venv-smoke/bin/python -m pip install -q dist/dlops-*.whl numpy
	cd / && $(CURDIR)/.venv-smoke/bin/python $(CURDIR)/tests/smoke.py

clean:
	rm -rf build dist $(VENV) .venv-oldest .venv-smoke dlops/*.so
