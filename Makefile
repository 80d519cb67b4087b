# Each target does its own set-up in .venv (scripts/environment.py); a second run finds it done.
#   make demo PYTHON=python3.12        another interpreter
#   make demo ARGS="--data ~/data"     arguments of the command
#   make test ARGS="-k sqnorm"
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
export VENV
# Waiting threads yield instead of spinning: with another process on the same cores, spinning costs up to 10 times.
# Benchmarks take OpenMP's own default, as people's programs do.
demo test: export OMP_WAIT_POLICY ?= passive
RUN = $(VENV)/bin/python

.PHONY: help demo test lint bench gpu-check aot-check clean

help:
	@echo "make demo       measure gradient variance on handwritten digits: a live table and a figure"
	@echo "make test       lint, types and all tests"
	@echo "make lint       ruff and mypy alone"
	@echo "make bench      kernel benchmarks of this machine"
	@echo "make gpu-check  GPU tests, bars and benchmarks, with the torch of \$$(PYTHON), offline"
	@echo "make aot-check  compile the GPU kernels of all benchmark cases without a GPU; registers, spills, tensor cores"
	@echo "make clean      remove what the other targets made"

demo:
	@$(PYTHON) scripts/environment.py demo
	$(RUN) -m gradclust_fast demo $(ARGS)

test: lint
	$(RUN) -m pytest $(ARGS)

lint:
	@$(PYTHON) scripts/environment.py test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench:
	@$(PYTHON) scripts/environment.py bench
	$(RUN) -m bench.run $(ARGS)

gpu-check:
	$(PYTHON) bench/gpu_check.py $(ARGS)

aot-check:
	@$(PYTHON) scripts/environment.py test
	$(RUN) -m bench.aot_check $(ARGS)
	$(RUN) -m bench.aot_check --precision high $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info gradclust_fast/_C*.so demo-out gpu-check-out
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
