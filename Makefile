# Everything runs in .venv, which is made on first use; nothing else is needed than Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
EXIT ?=

.PHONY: setup demo test check soak clients screenshots clean

setup: .venv/ready

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

demo: setup ## start everything on the embedded model, ask about drawn pictures, keep serving (EXIT=1: stop)
	$(BIN)/fovea demo $(if $(EXIT),--exit)

test: setup ## all tests, with a real Redis and a real Ray Serve
	$(BIN)/python -m pytest -m "not soak"

check: setup ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

soak: setup ## the same tests at full counts
	$(BIN)/python -m pytest

clients: setup ## official clients, each in an environment of its own, against a running service
	$(BIN)/python tests/clients/run.py

screenshots: setup ## the pictures of the page in docs/, made by its browser test
	mkdir -p docs
	$(BIN)/python -m pytest tests/test_page.py --screenshots=docs

clean:
	rm -rf .venv .venv-clients build *.egg-info
