# make demo    a pair on this machine, its primary killed, the disk alive: needs Python >= 3.11, no root
# make test    the tests; clients that are not installed (qemu-io, fio, nbdcopy …) are named and skipped
# make slow    the tests that take ten seconds or more each
# make soak    all that takes hours: copy-before-write against a model, the simulation, n-th faults, the long tests, chaos
#              until KILLS SIGKILLs and FAILOVERS failovers; OPERATIONS, SIMULATION_MINUTES and CHAOS_MINUTES say how long,
#              PARTS which of it; a summary at the end, exit code non-zero if anything failed
# make chaos   a pair of real processes, broken at random for MINUTES under verified load, compared byte by byte
VENV    ?= .venv
BIN     := $(VENV)/bin
JOBS    ?= 2
TESTS   ?= tests
OPERATIONS ?= 3000000
SIMULATION_MINUTES ?= 120
CHAOS_MINUTES ?= 120
KILLS ?= 1000
FAILOVERS ?= 200
PARTS ?=
MINUTES ?= 5
SOURCES := $(shell find common primary secondary deploy -name '*.py') pyproject.toml

.PHONY: demo test slow soak chaos lint types check clean

demo: $(VENV)/.demo
	$(BIN)/tandemdisk demo

test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup $(TESTS)

slow: $(VENV)/.test
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup -m "slow and not soak" $(TESTS)

soak: $(VENV)/.test
	$(BIN)/python -m tests.soak --operations $(OPERATIONS) --simulation-minutes $(SIMULATION_MINUTES) --jobs $(JOBS) \
		--chaos-minutes $(CHAOS_MINUTES) --kills $(KILLS) --failovers $(FAILOVERS) $(if $(PARTS),--only $(PARTS))

chaos: $(VENV)/.test
	$(BIN)/tandemdisk chaos --minutes $(MINUTES)

lint: $(VENV)/.test
	$(BIN)/ruff check .

types: $(VENV)/.test
	$(BIN)/mypy

check: test lint types

# Two stamps in one environment: the demo runs what a user gets from `pip install`, the tests run the working tree.
$(VENV)/.demo: $(SOURCES) | $(VENV)/.made
	$(BIN)/python -m pip install --quiet --disable-pip-version-check .
	@rm -f $(VENV)/.test && touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/.made
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,bench]'
	@rm -f $(VENV)/.demo && touch $@

$(VENV)/.made:
	@sh deploy/venv.sh $(VENV)
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
