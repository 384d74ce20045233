# Every target makes or refreshes .venv by itself (startup.sh; quick when nothing changed).
PY := .venv/bin/python
RUN ?= runs/demo

.PHONY: demo test test-interop lint venv clean

venv:
	@./startup.sh

demo: venv
	$(PY) dictionary_learning/demo.py --preset embedded --num_tokens 480000 --save_dir $(RUN) --overwrite

test: venv
	$(PY) -m ruff check .
	$(PY) -m mypy
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2

# Our exports in the real sae_lens and sparsify, and theirs here; skipped where those can't be installed.
test-interop:
	@./tests/interop/run.sh

lint: venv
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

clean:
	rm -rf .venv .venv-interop runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache
