# make run    the page, on http://127.0.0.1:7860   (make run ARGS="--port 8000")
# make test   all tests, offline                   (make test ARGS="-m 'not slow and not browser'")
# make setup  only what both of them do first: .venv with runtime, tools and the embedded model
# make check  lint, format, types                  make bench  measure, print a table, write JSON
# make kvpress  kvpress in its own environment: our press checked, its methods timed against ours
# make vllm   vLLM in its own environment: our plugin checked, and timed against vLLM without it
# make llamacpp  llama.cpp from its npm package in a folder of its own; precision "fast" timed against it, exact and transformers
# make openvino  OpenVINO GenAI, which evicts from its cache, in its own environment; the same, and DynamicKV timed against it
# make hostile  hostile input, many users, limits and privacy, against one server
# make soak   hundreds of comparisons on one server; its memory, threads, files and speed before and after
# make resolve  whether requirements.txt can be installed on every Python and torch of ZeroGPU Spaces, asked of the package index
# make audit  known holes in what is installed, asked of the package index
# make oldest the engine's tests with the oldest versions it supports, in environments of their own
# make clean  remove caches; .venv stays

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DONE   := $(VENV)/.done
ARGS   ?=
# The torch that the recorded runs and the measured figures were made with; requirements.txt has the range that works.
TORCH  ?= 2.13.0
PACKAGES := $(DONE)/packages-torch-$(TORCH)
# Of torch, the oldest that runs and the oldest that is current; the rest is in requirements-oldest.txt.
OLDEST_TORCH := 2.8.0 2.11.0

.DELETE_ON_ERROR:
.PHONY: setup run test check bench kvpress vllm oldest hostile soak resolve audit clean llamacpp openvino

setup: $(PACKAGES) $(DONE)/embedded

# One stamp per step: a step runs again when its requirements files are newer than its stamp, or when it did not finish.
$(DONE)/venv:
	@command -v $(PYTHON) >/dev/null || { echo "No $(PYTHON) here: install Python 3.10 or newer, or name one with make PYTHON=/path/to/python3." >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "$(PYTHON) is $$($(PYTHON) --version 2>&1): Python 3.10 or newer is needed, name one with make PYTHON=/path/to/python3." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(DONE) && touch $@

$(PACKAGES): requirements.txt requirements-dev.txt | $(DONE)/venv
	@echo "Installing into $(VENV): a few minutes the first time."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch==$(TORCH)" -r requirements.txt -r requirements-dev.txt
	@touch $@

$(DONE)/embedded: requirements-embedded.txt | $(PACKAGES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-embedded.txt
	@touch $@

run: setup
	$(BIN)/python app.py $(ARGS)

test: setup
	@command -v chromium chromium-browser google-chrome >/dev/null || echo "Chromium is not installed, so the browser tests are skipped here (they fail where CI=true); on Debian: apt-get install chromium." >&2
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# mypy would read the stubs that gradio writes beside component classes instead of the classes.
	@find app -name '*.pyi' -delete
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m benchmarks $(ARGS)

hostile: setup
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/server tests/app/serving tests/engine/models/test_models.py tests/engine/record/test_trace.py $(ARGS)

soak: setup
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.soak $(ARGS)
	$(BIN)/python -m benchmarks.readme

# Without npm the same figures, llama.cpp's left out.
llamacpp: setup
	@if command -v npm >/dev/null; then $(MAKE) --no-print-directory .llamacpp/.done; else echo "npm is not installed, so llama.cpp is left out." >&2; fi
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.cpu $(ARGS)

.llamacpp/.done: Makefile
	npm install --prefix .llamacpp --no-audit --no-fund --loglevel=error node-llama-cpp@3.21.1
	@touch $@

openvino: setup .venv-openvino/.done
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.cpu $(ARGS)

.venv-openvino/.done: requirements-openvino.txt | $(DONE)/venv
	$(PYTHON) -m venv .venv-openvino
	.venv-openvino/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-openvino.txt
	@touch $@

# pip judges markers by the Python it runs on; uv judges them for another one. jieba has no wheel.
resolve: .venv-tools/.done
	@for python in 3.10 3.12; do for torch in 2.8.0 2.9.1 2.10.0 2.11.0; do \
		echo "torch==$$torch" > .venv-tools/torch.txt; \
		.venv-tools/bin/uv pip compile --quiet requirements.txt --constraint .venv-tools/torch.txt --python-version $$python \
			--python-platform x86_64-manylinux_2_28 --only-binary :all: --no-binary jieba --output-file .venv-tools/resolved.txt >/dev/null || exit 1; \
		echo "Python $$python, torch $$torch: $$(grep -c == .venv-tools/resolved.txt) packages"; \
	done; done

audit: setup .venv-tools/.done
	.venv-tools/bin/pip-audit --strict --disable-pip --no-deps --requirement requirements.txt

.venv-tools/.done: requirements-tools.txt | $(DONE)/venv
	$(PYTHON) -m venv .venv-tools
	.venv-tools/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-tools.txt
	@touch $@

# kvpress pins an older transformers, so it lives in an environment of its own.
kvpress: setup .venv-kvpress/.done
	PYTHONPATH=. .venv-kvpress/bin/python -m pytest -q --noconftest -p no:cacheprovider tests/integrations
	$(BIN)/python -m benchmarks.kvpress .venv-kvpress/bin/python
	$(BIN)/python -m benchmarks.readme

.venv-kvpress/.done: requirements-kvpress.txt | $(DONE)/venv
	$(PYTHON) -m venv .venv-kvpress
	.venv-kvpress/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-kvpress.txt
	@touch $@

# vLLM pins its own torch, so it lives in an environment of its own, too. One process: the tests look at its scheduler.
VLLM_RUN := PYTHONPATH=. HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 VLLM_LOGGING_LEVEL=WARNING VLLM_PLUGINS=dynamickv \
	VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=2 .venv-vllm/bin/python
vllm: setup .venv-vllm/.done
	$(VLLM_RUN) -m pytest -q --noconftest -p no:cacheprovider tests/integrations/test_vllm*.py
	$(VLLM_RUN) -m benchmarks.vllm "$$($(BIN)/python -m benchmarks.embedded)"
	$(VLLM_RUN) -m benchmarks.vllm_curve "$$($(BIN)/python -m benchmarks.embedded)"
	$(BIN)/python -m benchmarks.readme

# torchvision, torchaudio and torchcodec come along and do not match the CPU build of torch.
.venv-vllm/.done: requirements-vllm.txt pyproject.toml | $(DONE)/venv
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-vllm.txt
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

# On Linux pip takes torch with several GB of CUDA packages; without a GPU, PyTorch's own index has it without them:
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make oldest
oldest: $(OLDEST_TORCH:%=.venv-oldest-%/.done)
	for torch in $(OLDEST_TORCH); do \
		HF_HUB_OFFLINE=1 .venv-oldest-$$torch/bin/python -m pytest -p no:cacheprovider tests/engine $(ARGS) || exit 1; \
	done

.venv-oldest-%/.done: requirements-oldest.txt requirements-embedded.txt
	$(PYTHON) -m venv .venv-oldest-$*
	@echo "Installing torch $* and the oldest supported versions: several minutes."
	.venv-oldest-$*/bin/python -m pip install --quiet --disable-pip-version-check "torch==$*" -r requirements-oldest.txt
	.venv-oldest-$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-embedded.txt
	@touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name '.venv*' -prune -o -type d -name __pycache__ -exec rm -rf {} +
