# Two commands to start: `make demo` and `make test`. Both set up .venv by themselves.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint types format results clean

demo: .venv/demo-installed  ## does a recurrent model pay on real Bach chorales? table, verdict, report.html
	$(BIN)/unrecurrent compare chorales --seeds 3 --epochs 30 --report report.html

test: .venv/test-installed  ## everything: unit tests, doctests, examples
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m "not alone"; \
	beside=$$?; $(BIN)/python -m pytest -m alone && exit $$beside

lint: .venv/test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/test-installed
	$(BIN)/mypy

results: .venv/test-installed  ## docs/results.md and the README's table from results/**/*.json
	$(BIN)/python benchmarks/results_page.py

format: .venv/test-installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo-installed: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) --editable ".[music]"
	touch $@

.venv/test-installed: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) --editable ".[music,onnx,dev]"
	touch $@ .venv/demo-installed

clean:
	rm -rf .venv build dist runs report.html
