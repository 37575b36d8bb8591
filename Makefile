# Each target does its own set-up. `make demo` and `make test` are the two to know.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DATA ?= ../shared/data
RUNS ?= runs

.PHONY: help setup demo test test-fast lint docs gpu gpu-run gpu-rehearse gpu-wheels real endurance clean

help:
	@echo "make demo   simulate ECGs, pretrain, fine-tune, compare: 3 minutes on 2 cores"
	@echo "make test   the test suite: about 13 minutes on 2 cores"
	@echo "make test-fast  what takes seconds of it: a minute and a half"
	@echo "make lint   ruff and mypy"
	@echo "make docs   the pages of docs/ as a site with a search: build/docs/index.html"
	@echo "make gpu    on a GPU, in 9 minutes at most: the kernels' tests, losses, benchmarks, training; results in $(RUNS)/gpu"
	@echo "make gpu-run PYTHON=python3       the same with a Python that has torch; what it lacks is taken from $(GPU)/wheels"
	@echo "make gpu-wheels GPU_PYTHON=3.12   fetch those wheels, for a machine without an index"
	@echo "make gpu-rehearse PYTHON=python3  the same script on a CPU"
	@echo "make real   the comparison on real recordings below DATA=$(DATA), two to three hours"
	@echo "make endurance  preemptions and kills on a real SLURM of this machine, about an hour (apt-get install slurm-wlm munge)"
	@echo "make setup  only install into $(VENV); PIP_FLAGS are passed to pip"

setup: $(STAMP)

$(STAMP): pyproject.toml .ci/constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ecgscale needs Python 3.11 or newer; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c .ci/constraints.txt -e '.[dev]'
	touch $@

demo: setup
	test -e $(RUNS)/demo/shards/manifest.json || $(BIN)/ecgscale simulate $(RUNS)/demo/shards --patients 400
	$(BIN)/ecgscale reproduce configs/reproduce/demo.yaml --data_dir $(RUNS)/demo --run.dir $(RUNS)/demo/runs

# A file stays in one process, for its fixtures: not by loadgroup, whose groups pytest-xdist 3.8 loses under pytest 9.2.
# Files go in the order of tests/conftest.py, the longest first; pytest-xdist would begin with those of the most tests.
PYTEST = $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder

test: setup
	$(PYTEST) -n 3 $(ARGS)

test-fast: setup
	$(PYTEST) -n 2 -m "not slow" $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs

gpu: setup
	$(MAKE) gpu-run PYTHON=$(BIN)/python

# What gpu-run takes along where a machine has no index and is lent for minutes: wheels, and what an earlier run left.
GPU := .gpu
GPU_OUT ?= $(RUNS)/gpu
GPU_PYTHON ?= 3.12
GPU_PLATFORMS := manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1
GPU_RUN = $(PYTHON) tests/trials/gpu_run.py --wheels $(GPU)/wheels --earlier $(GPU)/earlier $(ARGS)

gpu-wheels: setup
	rm -rf $(GPU)/wheels
	$(BIN)/python -m pip download --quiet --disable-pip-version-check $(PIP_FLAGS) --no-deps --only-binary=:all: \
	  --implementation cp --python-version $(GPU_PYTHON) $(foreach platform,$(GPU_PLATFORMS),--platform $(platform)_x86_64) \
	  -c .ci/constraints.txt -r .ci/gpu-wheels.txt -d $(GPU)/wheels
	DS_BUILD_OPS=0 $(BIN)/python -m pip wheel --quiet --disable-pip-version-check $(PIP_FLAGS) --no-deps \
	  -c .ci/constraints.txt deepspeed -w $(GPU)/wheels
	du -sh $(GPU)/wheels

gpu-rehearse:
	$(GPU_RUN) --device cpu --out $(GPU_OUT)-rehearsal

gpu-run:
	$(GPU_RUN) --out $(GPU_OUT)

real: setup
	test -e $(RUNS)/real/ptbxl/manifest.json || $(BIN)/ecgscale ingest $(DATA)/ptbxl $(RUNS)/real/ptbxl \
	  --labels $(DATA)/ptbxl/labels.csv --split-by strat_fold --validation-values 8 --test-values 9
	test -e $(RUNS)/real/seta/manifest.json || $(BIN)/ecgscale ingest $(DATA)/cinc2011_seta $(RUNS)/real/seta
	test -e $(RUNS)/real/ecgid/manifest.json || $(BIN)/ecgscale ingest $(DATA)/ecgid $(RUNS)/real/ecgid --patient-key @folder \
	  --ignore-leads "ECG I filtered" --validation-fraction 0.1 --test-fraction 0.5
	$(BIN)/ecgscale reproduce configs/reproduce/real.yaml --data_dir $(RUNS)/real --run.dir $(RUNS)/real/runs

endurance: setup
	$(BIN)/python tests/trials/endurance.py --out $(RUNS)/endurance $(ARGS)

clean:
	rm -rf $(VENV) $(RUNS) $(GPU) build dist *.egg-info
