# `make train`, `make compare` and `make test` need python3 (3.10 or later) and a package index, nothing else.
# ARGS goes to the program: make train ARGS="attention=mla trainer.max_steps=100"

PYTHON ?= python3
ARGS   ?=
EXTRAS := train,compare,wandb,triton,xformers,hf,slurm,dev
BIN    := .venv/bin
STAMP  := .venv/.installed
PYTEST  = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

QUICK   = experiment=quick attention=mha,mla,gated_deltanet match=params seeds=2

.PHONY: train compare test test-slow lint bench clean

train: $(STAMP)
	$(BIN)/attnzoo train $(ARGS)

compare: $(STAMP)
	$(BIN)/attnzoo compare $(QUICK) $(ARGS)

test: $(STAMP)
	$(PYTEST) -m "not slow and not gpu" $(ARGS)

# pytest exits with 5 when no test carries the marker.
test-slow: $(STAMP)
	$(PYTEST) -m "slow and not gpu" $(ARGS) || test $$? -eq 5

lint: $(STAMP)
	$(BIN)/ruff check . $(ARGS)

bench: $(STAMP)
	$(BIN)/python scripts/bench_train.py $(ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache

# torch and the build tools go first: the rest then builds against the pinned setuptools and
# cannot choose another torch. The stamp is written last, so a set-up that was cut short runs again.
$(STAMP): Makefile pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "error: PYTHON: attnzoo needs Python 3.10 or later; try 'make $(MAKECMDGOALS) PYTHON=python3.11'" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt torch setuptools wheel
	$(BIN)/python -m pip install -c constraints.txt --no-build-isolation -e ".[$(EXTRAS)]"
	touch $@
