# Every target sets up what it needs first, from Python 3.11+ and nothing else; once that is done it costs 0.1 s.
#   make run            a running endpoint on this machine      make lint    formatting, types, import rules
#   make test           all tests     make test-fast  seconds   make lock    write the lock files anew
#   make bench          against the peers, on an idle machine; BENCH_ARGS='embed --rounds 1'
#   make chaos          kills, freezes and cuts off real regions; CHAOS_ARGS='--only region --repeats 1'
# VENV=path uses another virtual environment, PYTHON=path another interpreter, PYTEST_ARGS='-k router -x' picks tests.
VENV ?= .venv
export VENV
# A region is a dozen Python processes, and the tests start hundreds: where none may keep what it compiles, compiling
# is half of what each does to start.
unexport PYTHONDONTWRITEBYTECODE

# Contract tests meet real parts (engines, databases, sockets), side by side; the slow ones a Ray cluster, one by one.
# A folder of tests that is not named here is fast: it cannot be forgotten.
SLOW := tests/integration tests/multiregion tests/chaos tests/e2e
SLOW_TESTS = $(sort $(shell find $(SLOW) -name 'test_*.py' 2>/dev/null))
PYTEST = $(VENV)/bin/python -m pytest $(PYTEST_ARGS)

.NOTPARALLEL:
.PHONY: run test test-fast test-contract test-slow setup bench chaos lint format lock clean

run:
	@scripts/bootstrap.sh run
	@$(VENV)/bin/nearfield up

test: test-fast test-contract test-slow

test-fast: setup
	$(PYTEST) -n auto tests --ignore=tests/contract $(addprefix --ignore=,$(SLOW))

test-contract: setup
	$(PYTEST) -n auto tests/contract

test-slow: setup
	$(if $(SLOW_TESTS),$(PYTEST) $(SLOW_TESTS),@echo 'no tests under $(SLOW)')

setup:
	@scripts/bootstrap.sh test

bench: setup
	$(VENV)/bin/python -m benchmarks run $(BENCH_ARGS)

chaos: setup
	$(VENV)/bin/python -m tests.chaos $(CHAOS_ARGS)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python -m mypy
	$(VENV)/bin/lint-imports --no-cache

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# make lock UPGRADE=--upgrade moves every version to its newest.
lock: setup
	scripts/lock.sh $(UPGRADE)

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .coverage htmlcov
