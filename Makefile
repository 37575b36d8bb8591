# Each target does its own set-up. `make demo` and `make test` are the two to know.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DATA ?= ../shared/data
RUNS ?= runs

.PHONY: help setup demo test lint gpu gpu-run real endurance clean

help:
	@echo "make demo   simulate ECGs, pretrain, fine-tune, compare: 3 minutes on 2 cores"
	@echo "make test   the test suite: about 11 minutes on 2 cores"
	@echo "make lint   ruff and mypy"
	@echo "make gpu    on a GPU: the kernels' tests and benchmarks, a bf16 ZeRO-1 run, plan --check; reports in $(RUNS)/gpu"
	@echo "            (make gpu-run PYTHON=python3: the same with a Python that has everything, nothing is installed)"
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

test: setup
	$(BIN)/python -m pytest -n 3 --dist loadgroup $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gpu: setup
	$(MAKE) gpu-run PYTHON=$(BIN)/python

gpu-run: export PYTHONPATH := $(CURDIR):$(CURDIR)/kernels:$(CURDIR)/launch
gpu-run:
	ECGSCALE_GPU=1 $(PYTHON) -m pytest $(ARGS) tests/kernels tests/test_cuda.py tests/training/test_clock.py
	$(PYTHON) -m ecgscale.cli bench kernel --device cuda --out $(RUNS)/gpu/bench
	@if command -v compute-sanitizer; then set -x; \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 $(PYTHON) -m ecgscale.cli \
	    bench kernel --device cuda --quick --no-compile --only patches stems --out $(RUNS)/gpu/sanitizer; \
	else echo "compute-sanitizer is not on the PATH: skipped"; fi
	test -e $(RUNS)/gpu/shards/manifest.json || $(PYTHON) -m ecgscale.cli simulate $(RUNS)/gpu/shards --patients 400
	$(PYTHON) -m ecgscale.cli pretrain --config configs/pretrain/base.yaml --data.shards $(RUNS)/gpu/shards \
	  --run.dir $(RUNS)/gpu/base --train.steps 50 --train.global_batch 128 --train.contrast_batch 128 --train.log_every 10 --profile
	$(PYTHON) -m ecgscale.cli bench step --preset base large --batch 32 --precision bf16 --compile off on --shards $(RUNS)/gpu/shards \
	  --out $(RUNS)/gpu/bench
	$(PYTHON) -m ecgscale.cli bench report $(RUNS)/gpu/bench --out $(RUNS)/gpu/report
	$(PYTHON) -m ecgscale.cli plan --check > $(RUNS)/gpu/plan.txt && cat $(RUNS)/gpu/plan.txt

real: setup
	test -e $(RUNS)/real/ptbxl/manifest.json || $(BIN)/ecgscale ingest $(DATA)/ptbxl $(RUNS)/real/ptbxl \
	  --labels $(DATA)/ptbxl/labels.csv --split-by strat_fold --validation-values 8 --test-values 9
	test -e $(RUNS)/real/seta/manifest.json || $(BIN)/ecgscale ingest $(DATA)/cinc2011_seta $(RUNS)/real/seta
	test -e $(RUNS)/real/ecgid/manifest.json || $(BIN)/ecgscale ingest $(DATA)/ecgid $(RUNS)/real/ecgid --patient-key @folder \
	  --ignore-leads "ECG I filtered" --validation-fraction 0.1 --test-fraction 0.5
	$(BIN)/ecgscale reproduce configs/reproduce/real.yaml --data_dir $(RUNS)/real --run.dir $(RUNS)/real/runs

endurance: setup
	$(BIN)/python tests/launch/endurance.py --out $(RUNS)/endurance $(ARGS)

clean:
	rm -rf $(VENV) $(RUNS) build dist *.egg-info
