# Every target makes or refreshes .venv by itself (startup.sh; quick when nothing changed).
PY := .venv/bin/python
RUN ?= runs/demo

# Browsers, signals, servers and processes share two cores that may be busy. What fails there is run once more by itself,
# and both are told: a defect fails again. A crash of pytest or an interrupt is final.
AGAIN = { echo "make: what failed is run once more, alone; a test that passes now is still one to mend"; \
	OMP_NUM_THREADS=1 $(PY) -m pytest --last-failed --last-failed-no-failures none; }

.PHONY: demo test test-interop lint venv clean

venv:
	@./startup.sh

demo: venv
	$(PY) dictionary_learning/demo.py --preset embedded --num_tokens 480000 --save_dir $(RUN) --overwrite

test: venv
	$(PY) -m ruff check .
	$(PY) -m mypy
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 || { [ $$? = 1 ] && $(AGAIN); }

# Our exports in the real sae_lens and sparsify, and theirs here; skipped where those can't be installed.
test-interop:
	@./tests/interop/run.sh

lint: venv
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

clean:
	rm -rf .venv .venv-interop runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache
