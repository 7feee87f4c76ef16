# Every target sets itself up: a machine with Python 3.11 or newer and a package index is enough.

PYTHON ?= python3
PY     := .venv/bin/python
PIP    := $(PY) -m pip install -q --disable-pip-version-check -c constraints.txt
STAMP  := .venv/.installed
TORCH  := $(shell sed -n '/^torch==/p' constraints.txt)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo results test test-isa test-pipelines test-fuzz test-zoo coverage lint spelling typecheck dist clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

demo: $(STAMP)  ## quantize the bundled denoiser, compare and measure it; report in demo_report/
	.venv/bin/dmq-ao demo -o demo_report

results: $(STAMP)  ## stored results that today's recipes would not make; RERUN=demo/w4a8/default.json measures one again
	$(PY) examples/results.py $(if $(RERUN),--rerun "$(RERUN)" -- $(ARGS))

test: $(STAMP)  ## the fast tests: CPU, offline
	$(PY) -m pytest -q -n auto --dist worksteal --durations 15

# Under one name where ONEDNN_MAX_CPU_ISA has it, else under each of three.
test-isa: $(STAMP)  ## the layers of the onednn backend on the instructions of lesser CPUs; ten minutes
	$(PY) -m tests.isa

test-pipelines: $(STAMP)  ## published recipes on eight tiny pipelines, three dtypes, one step and four; an hour
	$(PY) tests/pipelines_table.py $(ARGS)

test-fuzz: $(STAMP)  ## ten thousand edited files, and what becomes of them; ten minutes
	$(PY) tests/fuzz_files.py --cases 10000

test-zoo: $(STAMP)  ## five hundred drawn denoisers, and what becomes of each; half an hour
	$(PY) tests/zoo_run.py --cases 0:500 --jobs 2

coverage: $(STAMP)  ## the fast tests, and how many lines of the package they run; fails below nine in ten
	rm -f .coverage .coverage.*
	$(PY) -m pytest -q -n auto --dist worksteal --cov --cov-report term

spelling: $(STAMP)  ## codespell on everything that is tracked
	git ls-files -z | xargs -0 $(PY) -m codespell_lib

lint: $(STAMP) spelling typecheck  ## ruff (rules and format), codespell, then mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# On an installed copy and outside the root, where the checkout's dmq_ao/ would hide dmq_ao.observers and its siblings.
# build/lib is removed because setuptools packs whatever an earlier build left there.
typecheck: $(STAMP)  ## mypy --strict on an installed copy
	rm -rf build/typecheck build/lib build/bdist.*
	$(PIP) --no-deps --no-build-isolation --target build/typecheck .
	cd build/typecheck && ../../$(PY) -m mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p dmq_ao

# The wheel is made from the source archive, so what that lacks is missing in both.
dist: $(STAMP)  ## source archive and wheel in dist/, checked in a new environment outside of the checkout
	rm -rf dist build/lib build/bdist.*
	$(PY) -m build --no-isolation
	$(PY) .ci/check_dist.py

clean:  ## remove what make made; build/ may hold the state of a training run, and stays otherwise
	rm -rf .venv demo_report dist .coverage .coverage.* build/typecheck build/lib build/bdist.* *.egg-info
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A .venv that is already there is kept and brought to the pins. torch goes first and alone: it is the large download,
# and everything after it then takes the build that is installed.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(PY) || { echo "creating .venv"; $(PYTHON) -m venv .venv; }
	@$(PY) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "the pinned set-up needs Python 3.11 or newer: rm -r .venv, then make PYTHON=python3.12 ...")'
	@echo "installing $(TORCH) (a large download the first time)"
	@$(PIP) $(TORCH) setuptools wheel
	@echo "installing dmq_ao and what it is tested with"
	@$(PIP) -e ".[cli,report,eval,test,dev]"
	@touch $@
