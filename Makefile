# make train   set up on first use, then the main job: PPO on the default scenario and the comparison table
# make test    set up on first use, then all tests
# make quick   the tests of the inner loop
# make live    the smoke test of the bridge against real vLLM, which it installs on first use (examples/live_cpu)
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready

.PHONY: train test quick live lint clean

train: $(READY)
	$(VENV)/bin/python train.py agent=ppo $(ARGS)

test: $(READY)
	$(VENV)/bin/python -m pytest $(ARGS)

quick: $(READY)
	$(VENV)/bin/python -m pytest -m "not slow" $(ARGS)

live:
	.ci/live

lint: $(READY)
	$(VENV)/bin/ruff format --check . && $(VENV)/bin/ruff check . && $(VENV)/bin/mypy

# torch first and by its exact version: with it in place nothing asks for a build with CUDA packages.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet $$(grep '^torch==' constraints.txt)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[train,dev,bridge,export]'
	touch $@

clean:
	rm -rf $(VENV)
