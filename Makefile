# make serve | test | demo each do all of the set-up they need, once.
#
# HOST, PORT, MODEL: where to serve, and what. TRACE: what to replay. KIND: cpu or gpu; found out by itself.
# VLLMS: the releases that `make contracts` looks at besides the installed one, and ARGS more of them.
# WORKERS: processes that tests without an engine are run in; 0 for a debugger.

HOST ?= 127.0.0.1
PORT ?= 8000
MODEL ?= tiny
KIND ?= $(shell test -e /dev/nvidiactl && echo gpu || echo cpu)
PYTHON ?= python3
ARGS ?=
TRACE ?= paper:0:3
VLLMS ?= 0.27.0 0.33.0
WORKERS ?= 2

# PyTorch's CPU builds are on the configured package indexes on some machines, on PyTorch's own everywhere.
TORCH_CPU_INDEX = https://download.pytorch.org/whl/cpu

PARALLEL = -n $(WORKERS) --dist loadfile

BIN = .venv/bin
PIP = $(BIN)/python -m pip --quiet --disable-pip-version-check
READY = .venv/.ready-$(KIND)

.PHONY: setup check test test-fast test-wire test-engine test-wheel contracts serve demo replay report bench gpu-check lock clean

setup: $(READY)

$(READY): requirements/$(KIND).txt requirements/dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	@echo "setting up .venv for a $(KIND) machine: some gigabytes, some minutes, once"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) install --upgrade pip
	@$(PIP) install --no-deps -r requirements/$(KIND).txt || \
		{ test $(KIND) = cpu && $(PIP) install --no-deps --extra-index-url $(TORCH_CPU_INDEX) -r requirements/cpu.txt; }
	@$(PIP) install --no-deps -r requirements/dev.txt --editable .
	@touch $@
	@echo "set up"

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# By what a test may do: tests/kinds.py (`--kind=engine`: apart, pytest would take `engine` for the folder). Those with an engine share one, so they run in one process.
test: test-fast test-wire test-engine

test-fast: $(READY)
	$(BIN)/python -m pytest --kind=fast $(PARALLEL) $(ARGS)

test-wire: $(READY)
	@sh tests/install-servers.sh
	$(BIN)/python -m pytest --kind=wire $(PARALLEL) $(ARGS)

test-engine: $(READY)
	@sh tests/install-servers.sh
	$(BIN)/python -m pytest --kind=engine $(ARGS)

# What a user installs: the wheel in a clean environment, its size, its commands, and an answer through it.
test-wheel: $(READY)
	$(BIN)/python -m tests.deploy.smoke_wheel

# The oldest and the newest vLLM that we support, without their engines: see engine/compat.py.
contracts: $(READY)
	@sh tests/contracts/run.sh $(VLLMS) $(ARGS)

serve: $(READY)
	@exec $(BIN)/justitia serve --host $(HOST) --port $(PORT) --model $(MODEL) $(ARGS)

demo: $(READY)
	@exec $(BIN)/justitia demo $(ARGS)

replay: $(READY)
	@exec $(BIN)/justitia replay $(TRACE) $(ARGS)

report: $(READY)
	$(BIN)/python -m tests.benchmarks.replay_report $(ARGS)

bench: $(READY)
	$(BIN)/python -m tests.benchmarks.speed $(ARGS)
	$(BIN)/python -m tests.benchmarks.queue_speed

# On a machine with an NVIDIA GPU: our scheduler against vLLM's own, tokens, throughput and a step's cost, as one line of JSON.
gpu-check: $(READY)
	@exec $(BIN)/python -m tests.benchmarks.engine_check --gpu $(ARGS)

lock:
	$(BIN)/python requirements/lock.py cpu
	$(BIN)/python requirements/lock.py gpu
	$(BIN)/python requirements/lock.py gateway
	$(BIN)/python requirements/lock.py dev

clean:
	rm -rf .venv .vllm .mypy_cache .ruff_cache .pytest_cache .hypothesis demo-results bench-results dist
