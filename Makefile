# make demo   the comparison with a stock-like merge, on files that it makes itself (no GPU, no Forge)
# make test   what CI runs: lint, then every test
# make lint   ruff and mypy
# make fuzz   files, prompts, infotexts and requests that somebody made to do harm: 28,000, on two cores
#             (another seed, one kind alone: make fuzz FUZZ="--seed 2 --target pickles")
# make bench  kernels and bytes on a card (counted), and on this machine's card or CPU: forwards, attaching,
#             memory, families, norms; with FORGE_ROOT beside Forge's own way (a minute: make bench BENCH=--quick)
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/ready

# Threads that wait sleep: on a machine that is busy, torch on the CPU is then several times faster.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test lint fuzz bench

demo: $(READY)
	$(BIN)/python -m lib_precision_lora demo $(DEMO)

# A process for each core, of one thread each.
test: export OMP_NUM_THREADS := 1
test: lint
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadgroup

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fuzz: export OMP_NUM_THREADS := 1
fuzz: $(READY)
	$(BIN)/python -m tests.fuzz $(FUZZ)

# One thread: times are then those of the process, which other programs do not lengthen.
bench: export OMP_NUM_THREADS ?= 1
bench: $(READY)
	$(BIN)/python -m benchmarks $(BENCH)

$(READY): requirements-test.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-test.txt
	touch $(READY)
