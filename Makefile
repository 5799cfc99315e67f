# make demo: install, run the main job on the embedded pictures, leave a report
# make test: install, then lint, type-check and run every test
# make test-latest, make test-lowest: every test on the newest and the lowest allowed versions
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# In two processes, a file as a whole in one of them; each computes in one thread.
PYTEST := python -m pytest --numprocesses 2 --dist loadfile

.PHONY: install install-dev demo test test-latest test-lowest lint types build clean

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e ".[dev]"
	@touch $@

demo: install
	$(BIN)/taxolens demo

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install-dev
	$(BIN)/pyright --pythonpath $(BIN)/python

test: lint types
	OMP_NUM_THREADS=1 $(BIN)/$(PYTEST)

# Each in a fresh environment, without constraints.txt. "Lowest" is the lower bound of every
# dependency in pyproject.toml; what those depend on is the newest that they allow. torch alone stays
# pinned in both: its other versions need the CUDA packages on most indexes. Where an index has CPU
# builds of all: make test-lowest TORCH=torch==2.6.0
TORCH ?= $(shell grep '^torch==' constraints.txt)
BOUNDS_latest := true
BOUNDS_lowest := grep -oE '"[a-z0-9-]+(\[[a-z]+\])?>=[0-9.]+' pyproject.toml | tr -d '"' \
	| sed -E 's/(\[[a-z]+\])?>=/==/' | grep -v '^torch==' | sort -u

test-latest test-lowest: test-%:
	$(PYTHON) -m venv --clear .venv-$*
	{ echo "$(TORCH)"; $(BOUNDS_$*); } > .venv-$*/constraints.txt
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check \
		-c .venv-$*/constraints.txt -e ".[dev]"
	OMP_NUM_THREADS=1 .venv-$*/bin/$(PYTEST)

build: install-dev
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) build dist *.egg-info
