# Every target first creates the virtual environment if it is missing (`gpu` does not when RUN names another Python).
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
CONSTRAINTS ?= constraints.txt
EXTRA ?= dev
TESTS ?=
ARGS ?=
# One single-threaded process per core, because the tests are many and small. Tests of a group share compiled kernels.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses auto --dist loadgroup

.PHONY: setup train compare test test-slow test-exhaustive test-oldest test-layers lint bench results gpu gpu-all clean

setup: $(VENV)/installed

$(VENV)/installed: setup.py pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "mnistnorm needs Python 3.10 or newer: make PYTHON=python3.x")'
	@test -e $(VENV) || rm -f $(VENV)  # a dangling link
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable '.[$(EXTRA)]'
	touch $@

# make train ARGS=--resume continues a stopped run.
train: setup
	$(RUN) -m mnistnorm.train --fused $(ARGS)

compare: setup
	$(RUN) -m mnistnorm.compare --fused $(ARGS)

test: setup
	$(PYTEST) -m 'not slow and not exhaustive' $(TESTS) $(ARGS)

test-slow: setup
	$(PYTEST) -m slow $(ARGS)

test-exhaustive: setup
	$(PYTEST) -m exhaustive --junit-xml=.pytest_cache/exhaustive.xml $(ARGS)
	$(RUN) -m tests.kernels.triton_impl.test_compile_matrix .pytest_cache/exhaustive.xml

# The default tests with the oldest torch, torchvision and Triton that setup.py allows.
test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

# The default tests of the layers, with versions in between and without the packages that the programs need.
PROGRAMS_NEEDED := fusion test_fx.py triton_impl/test_compile_matrix.py triton_impl/test_launches.py
test-layers:
	$(MAKE) test VENV=.venv-layers CONSTRAINTS=constraints-layers.txt EXTRA=test \
		TESTS='tests/kernels $(addprefix --ignore=tests/kernels/,$(PROGRAMS_NEEDED))'

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# make bench ARGS="--layers='--shapes ladder --dtypes bfloat16'" passes flags to benchmarks.layers.
bench: setup
	$(RUN) -m pytest benchmarks --benchmark-only $(ARGS)

# Measures the tables of README.md, docs/results.md and docs/fuse.md: one to two hours on an idle machine.
# make results ARGS='--only layers host' measures some of them.
results: setup
	$(RUN) -m benchmarks.results $(ARGS)

# Tests and benchmarks for a GPU, the most informative first; the output goes to gpu/, see docs/gpu.md. `make gpu` takes
# less than eight minutes, `make gpu-all` about an hour. `make gpu RUN=python3` uses a Python that already has torch and
# Triton: it creates no virtual environment and needs no network.
GPU ?= H100
TARGET ?= sm_90
GPU_TESTS := -m pytest -o addopts= -W default -m 'not slow and not exhaustive' -q
# $(call stage,NAME,SECONDS,COMMAND): a stage that fails or takes longer is listed in gpu/failures.txt; the next one runs.
stage = PYTHONUNBUFFERED=1 timeout $(2) $(RUN) $(3) > gpu/$(1).txt 2>&1 \
	|| echo 'gpu/$(1).txt: failed, or took longer than $(2) s' | tee -a gpu/failures.txt

gpu: $(if $(filter file,$(origin RUN)),setup)
	@$(RUN) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "make gpu: torch finds no GPU here")'
	@mkdir -p gpu && rm -f gpu/failures.txt
	(nvidia-smi || rocm-smi; $(RUN) -m torch.utils.collect_env) > gpu/machine.txt 2>&1
	$(call stage,tests,100,$(GPU_TESTS) tests/kernels/triton_impl/test_kernels.py tests/kernels \
		$$($(RUN) -c 'import xdist' 2>/dev/null && echo --numprocesses 8 --dist loadgroup))
	$(call stage,graph,80,$(GPU_TESTS) tests/mnistnorm/test_step.py -k gpu)
	$(call stage,layers,30,-m benchmarks.layers --device cuda --shapes network-128 --dropout 0 --contenders triton --rounds 20 \
		--json gpu/layers.json)
	$(call stage,large,60,-m benchmarks.layers --device cuda --shapes 64x256x56x56 --dropout 0 --rounds 20 --json gpu/large.json)
	$(call stage,training,110,-m benchmarks.training --device cuda --norms batch --dropout 0 --steps 50 --rounds 6 --compile \
		--json gpu/training.json)
	$(call stage,accuracy,80,-m benchmarks.training --device cuda --norms group --dropout 0 --to-accuracy --epochs 5 --workers 4 \
		--json gpu/accuracy.json)
	@echo 'now send the folder gpu/: see docs/gpu.md'; test ! -s gpu/failures.txt

gpu-all: gpu
	$(call stage,all-tests,3600,$(GPU_TESTS) tests/kernels tests/mnistnorm -m 'not exhaustive')
	$(call stage,all-layers,1200,-m benchmarks.layers --device cuda --json gpu/all-layers.json)
	$(call stage,ladder,1200,-m benchmarks.layers --device cuda --contenders all --shapes ladder --dropout 0 \
		--dtypes float32 bfloat16 --json gpu/ladder.json --plot gpu/ladder.png)
	$(call stage,traffic,600,-m benchmarks.traffic --gpu $(GPU) --json gpu/traffic.json --plot gpu/traffic.png)
	$(call stage,compiled,1200,-m benchmarks.compiled --target $(TARGET) --json gpu/compiled.json)
	$(call stage,models,1200,-m benchmarks.models --device cuda --json gpu/models.json)
	$(call stage,all-training,1200,-m benchmarks.training --device cuda --compile --json gpu/all-training.json)
	$(call stage,host,600,-m benchmarks.host --json gpu/host.json)
	@test ! -s gpu/failures.txt

clean:
	rm -rf $(VENV) .venv-oldest .venv-layers build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
