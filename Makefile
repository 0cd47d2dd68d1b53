# make demo    a trained network, from its published weights to this machine and to an emulated phone
# make test    linter, types and every test
# make fuzz    random small networks against PyTorch, for MINUTES=5
# make test-fast   linter, types and tests of a few seconds each
# make docs    docs/ as a site, in site/
# make bench   the short benchmarks
# make lint    linter and types alone
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
MINUTES ?= 5
export PYTHON VENV

RUN := $(VENV)/bin/python
# Each test process takes its share of the cores. Text is UTF-8 even after a library has set its process to another locale.
THREADS := OMP_NUM_THREADS=1 PYTHONUTF8=1

.PHONY: demo test fuzz bench lint style prepare constraints test-fast docs

demo:
	@.ci/prepare --emulator
	@$(RUN) examples/demo.py

# A command with mypy beside it: tests leave a core idle while they start and end. What mypy said is shown if it failed.
beside_types = said=$$(mktemp); $(RUN) -m mypy >$$said 2>&1 & types=$$!; \
	$(THREADS) $(1); code=$$?; wait $$types || { cat $$said; code=1; }; rm -f $$said; exit $$code

test: style
	@.ci/prepare --emulator --opencl
	@$(call beside_types,$(RUN) -m pytest -q -n $(JOBS) --dist worksteal --durations 30 --durations-min 5)

fuzz: prepare
	@$(RUN) -W ignore -m tests.fuzz --minutes $(MINUTES)

# Files that touch every package. With linter and types they take 108 s of processor time, which was
# 2 min 23 s by the clock beside other programs (a load of 3, 28 November 2026).
FAST := root target cli commands linker liveness_rules boolean_logic short_names transpose check frontend

test-fast: style
	@$(call beside_types,$(RUN) -m pytest -q -n $(JOBS) --dist load -m "not (slow or device or network or gpu)" \
		$(FAST:%=tests/test_%.py))

lint: style
	@$(RUN) -m mypy

style: prepare
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

docs: prepare
	@$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

bench:
	@.ci/prepare
	@$(RUN) -m benchmarks

prepare:
	@.ci/prepare

# Pin what is installed now, after the tests passed with it.
constraints:
	@$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@$(RUN) .ci/pin > constraints.txt.new && mv constraints.txt.new constraints.txt
