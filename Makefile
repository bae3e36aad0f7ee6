# Two commands set everything up on a fresh machine: `make test` and `make demo`. `make quick` is for the minutes between.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TEST_PROCESSES ?= auto

.PHONY: demo test realworld realworld-video quick slow lint check docs clean

$(READY): pyproject.toml requirements-oracles.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[demo,realworld,bench,dev]'
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-oracles.txt
	touch $(READY)

demo: $(READY)
	$(BIN)/kd demo

test: $(READY)
	$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES)

quick: lint
	$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) -m 'not slow'

# The papers' claims on real images, measured: about 95 minutes on two processors, FORM=--full a night. It goes on where it was
# stopped, and writes docs/results.md. Images come from packages: Debian's have to be there, see recipes/README.md.
realworld: $(READY)
	mkdir -p build/realworld
	cp recipes/realworld/package.json build/realworld
	-cd build/realworld && npm install --silent --no-audit --no-fund
	PYTHON=$(CURDIR)/$(BIN)/python recipes/realworld/run.sh --out build/realworld --docs docs $(FORM)

# P4's claims on rendered clips of actions, measured: docs/realworld-p4-video.md. It goes on where it was stopped.
realworld-video: $(READY)
	PYTHON=$(CURDIR)/$(BIN)/python recipes/realworld-video/run.sh --out build/realworld-video --docs docs $(FORM)

# Measures every test, best on an idle machine, and lists those that `make quick` leaves out.
slow: $(READY)
	mkdir -p build
	$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --durations=0 > build/durations.txt
	$(BIN)/python tests/slow.py build/durations.txt

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy kdcli
	$(BIN)/lint-imports

check: lint test

# The pages of docs/ as a site in build/site; a link that leads nowhere is an error.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) build *.egg-info kd-demo
