# Two commands matter: `make serve` and `make test`. Each makes what it needs in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := -c constraints.txt

.PHONY: serve test check fmt bench exact invariant fuzz replay overload faults kills mutants clients system schemathesis clean

serve: $(VENV)/serve.stamp ## serve SmolLM2-135M-Instruct on http://127.0.0.1:8000 (ARGS="..." adds flags)
	@$(BIN)/hocket serve $(ARGS)

test: $(VENV)/dev.stamp ## run the tests
	@start=$$(date +%s); $(BIN)/python -m pytest $(ARGS); status=$$?; \
	  echo "tests took $$(( $$(date +%s) - start )) s"; exit $$status

check: $(VENV)/dev.stamp ## lint, format, types, layers, purity
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/architecture

fmt: $(VENV)/dev.stamp ## format and mend what a machine can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/dev.stamp ## micro-benchmarks: planning and dispatch time, fragmentation, startup by phase, what the stack costs
	$(BIN)/python -m tests.bench.planning
	$(BIN)/python -m tests.bench.dispatch
	$(BIN)/python -m tests.bench.burst
	$(BIN)/python -m tests.bench.fragmentation
	$(BIN)/python -m tests.bench.startup
	$(BIN)/python -m tests.bench.stack_cost

exact: $(VENV)/dev.stamp ## compare every forced position with transformers (minutes)
	$(BIN)/python -m tests.exact

invariant: $(VENV)/dev.stamp ## compare logits bit by bit, alone and in random company (20 minutes)
	GOMP_SPINCOUNT=2000 $(BIN)/python -m tests.exact.invariance $(ARGS)

fuzz: $(VENV)/dev.stamp ## check the law on many random schedules (ARGS="--num 100000", about an hour)
	$(BIN)/python -m tests.properties $(ARGS)

replay: $(VENV)/dev.stamp ## ten minutes of mixed load with a decision log, and the log replayed
	$(BIN)/python -m tests.bench.replay $(ARGS)

overload: $(VENV)/dev.stamp ## goodput at 10 times the capacity, clients that hang up, idle streams (12 minutes)
	$(BIN)/python -m tests.bench.overload $(ARGS)
	$(BIN)/python -m tests.bench.disconnects
	$(BIN)/python -m tests.bench.idle_streams

faults: $(VENV)/dev.stamp ## kill and freeze the process of the model under load, 50 times (3 minutes)
	$(BIN)/python -m tests.bench.instance_faults $(ARGS)

kills: $(VENV)/dev.stamp ## kill, restart and behead two instances under load; each stream judged to the token (25 minutes)
	$(BIN)/python -m tests.bench.kills $(ARGS)
	$(BIN)/python -m tests.bench.kills --num 20 --model smollm2-135m --clients 4 $(ARGS)
	$(BIN)/python -m tests.bench.rolling $(ARGS)
	$(BIN)/python -m tests.bench.rolling --head $(ARGS)

mutants: $(VENV)/dev.stamp ## plant known bugs in copies of the tree, and see that the tests find each (minutes)
	$(BIN)/python -m tests.mutants $(ARGS)

clients: $(VENV)/dev.stamp ## run unmodified clients of others against real servers (ARGS="openai_sdk" runs one)
	$(BIN)/python -m tests.clients $(ARGS)

system: $(VENV)/dev.stamp ## a real Prometheus watches a server under load (needs Debian's prometheus; 2 minutes)
	$(BIN)/python -m tests.system.prometheus $(ARGS)

schemathesis: $(VENV)/dev.stamp ## requests made from /openapi.json, 300 an operation: no 500 (minutes; its own environment)
	$(BIN)/python -m tests.schema $(ARGS)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/serve.stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing Hocket into $(VENV): about a minute"; start=$$(date +%s); \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e . && touch $@ \
	  && echo "installing took $$(( $$(date +%s) - start )) s"

$(VENV)/dev.stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing Hocket and its test tools into $(VENV): about a minute"; start=$$(date +%s); \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e '.[dev]' && touch $@ $(VENV)/serve.stamp \
	  && echo "installing took $$(( $$(date +%s) - start )) s"

clean: ## remove what the commands above made
	rm -rf $(VENV) build dist *.egg-info .hypothesis .pytest_cache .mypy_cache .ruff_cache
