# make demo   the whole pipeline on a toy world: no GPU, no downloads except packages
# make test   all tests, on the CPU
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export YOLO_AUTOINSTALL := false
export YOLO_OFFLINE := true
export TOKENIZERS_PARALLELISM := false

.PHONY: venv demo test test-slow test-gpu results base-models lint clean help

help:
	@echo "make demo         toy world -> checks -> stage 1 -> 2 -> 3 -> evaluation (about 5 minutes on 2 cores)"
	@echo "make venv         .venv with all that requirements.txt names (the other targets do this too)"
	@echo "make test         all tests (about 4 minutes on 2 cores)"
	@echo "make test-slow    long runs that watch memory and files (about 3 minutes)"
	@echo "make test-gpu     log-probs, gradients and sampling on a CUDA GPU against the CPU (about a minute)"
	@echo "make results      the demo plus all that a claim rests on: docs/results.md (hours; resumes)"
	@echo "make base-models  build what is missing in demo/base/ from the toy world (tens of minutes)"
	@echo "make lint         ruff"
	@echo "make clean        remove output/demo"

# The stamp is written last, so an installation that was cut off is repeated; newer requirements repeat it too.
STAMP := $(VENV)/.requirements-installed
$(STAMP): requirements.txt
	@$(PYTHON) -c 'import platform, sys; sys.exit(0 if sys.version_info >= (3, 11) else \
	"Drive-VLM needs Python 3.11 or newer, this is %s. Set PYTHON=/path/to/python3.11." % platform.python_version())'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing requirements.txt into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

venv: $(STAMP)
	@echo "Activate it with: source $(VENV)/bin/activate"

demo: $(STAMP)
	@$(BIN)/python -m demo.run

results: $(STAMP)
	@$(BIN)/python -m demo.results

test: $(STAMP)
	@CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -q -m "not slow and not gpu" -n 2 --dist loadfile --durations=10

test-slow: $(STAMP)
	@CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -q -m slow -s

test-gpu: $(STAMP)
	@CUDA_VISIBLE_DEVICES=$${CUDA_VISIBLE_DEVICES:-0} $(BIN)/python -m pytest -q -m gpu tests/test_gpu.py

base-models: $(STAMP)
	@$(BIN)/python -m demo.base_models

lint: $(STAMP)
	@$(BIN)/ruff check .

clean:
	rm -rf output/demo
