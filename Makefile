# Every target sets itself up: the first one makes the virtual environment and installs into it, once.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
CONSTRAINTS ?= constraints.txt
ARGS ?=
# A process for each core, of one thread: the tests are many and small. Those of a group share what they compile.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses auto --dist loadgroup

.PHONY: setup train compare test test-slow test-exhaustive test-oldest lint bench results gpu clean

setup: $(VENV)/installed

$(VENV)/installed: setup.py pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "mnistnorm needs Python 3.10 or newer: make PYTHON=python3.x")'
	@test -e $(VENV) || rm -f $(VENV)  # a link to nowhere
	$(PYTHON) -m venv --clear $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable '.[dev]'
	touch $@

# make train ARGS=--resume continues a run that was stopped.
train: setup
	$(RUN) -m mnistnorm.train --fused $(ARGS)

compare: setup
	$(RUN) -m mnistnorm.compare --fused $(ARGS)

test: setup
	$(PYTEST) -m 'not slow and not exhaustive' $(ARGS)

test-slow: setup
	$(PYTEST) -m slow $(ARGS)

test-exhaustive: setup
	$(PYTEST) -m exhaustive --junit-xml=.pytest_cache/exhaustive.xml $(ARGS)
	$(RUN) -m tests.kernels.triton_impl.test_compile_matrix .pytest_cache/exhaustive.xml

# The default tests with the oldest versions of torch, torchvision and Triton that setup.py allows.
test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# make bench ARGS="--layers='--shapes ladder --dtypes bfloat16'" takes the flags of benchmarks.layers.
bench: setup
	$(RUN) -m pytest benchmarks --benchmark-only $(ARGS)

# Measures what README.md and docs/results.md claim, an hour or two of a quiet machine; ARGS='--only layers host' does a part of it.
results: setup
	$(RUN) -m benchmarks.results $(ARGS)

# Everything that a GPU can tell, into gpu/: docs/gpu.md says what to do with it.
GPU ?= H100
TARGET ?= sm_90
gpu: setup
	@$(RUN) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "make gpu: torch finds no GPU here")'
	mkdir -p gpu
	(nvidia-smi || rocm-smi; $(RUN) -m torch.utils.collect_env) > gpu/machine.txt 2>&1
	$(RUN) -m pytest tests/kernels -m 'not exhaustive' > gpu/tests.txt 2>&1 || { tail -n 20 gpu/tests.txt; exit 1; }
	$(RUN) -m benchmarks.layers --device cuda --json gpu/layers.json > gpu/layers.txt
	$(RUN) -m benchmarks.layers --device cuda --contenders all --shapes ladder --dropout 0 --dtypes float32 bfloat16 \
		--json gpu/ladder.json --plot gpu/ladder.png > gpu/ladder.txt
	$(RUN) -m benchmarks.traffic --gpu $(GPU) --json gpu/traffic.json --plot gpu/traffic.png > gpu/traffic.txt
	$(RUN) -m benchmarks.compiled --target $(TARGET) --json gpu/compiled.json > gpu/compiled.txt
	$(RUN) -m benchmarks.models --device cuda --json gpu/models.json > gpu/models.txt
	$(RUN) -m benchmarks.training --device cuda --compile --json gpu/training.json > gpu/training.txt
	$(RUN) -m benchmarks.host --json gpu/host.json > gpu/host.txt
	@echo 'now send the folder gpu/: see docs/gpu.md'

clean:
	rm -rf $(VENV) .venv-oldest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
