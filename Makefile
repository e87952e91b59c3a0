# make demo    quantize the small model that comes with the repository, print what each method costs
# make test    run the tests
# make lint    ruff and mypy
# make docs    build the documentation into site/
#
# Each of them first makes .venv with everything in it, unless that is up to date already. Nothing
# outside this folder is touched; `make clean` removes what was made.

VENV ?= .venv
# The first Python here that is new enough. `make demo PYTHON=/path/to/python3.11` picks another.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$python && break; done)

bin := $(VENV)/bin
installed := $(VENV)/.installed
native := CMakeLists.txt $(wildcard $(addprefix src/lutra/kernels/cpu/*.,cpp h inc))
pip := $(bin)/python -m pip --disable-pip-version-check
# Threads that wait for work sleep instead of spinning: on a machine that has other things to do,
# spinning threads take the cores from each other (five times slower on two busy cores).
export OMP_WAIT_POLICY ?= passive
# Behind a failing command: say what to do, then fail.
or_explain = || { printf '\nlutra set-up: %s\n' $(1) >&2; exit 1; }

.PHONY: demo test lint docs setup clean

demo: $(installed)
	$(bin)/lutra demo demo-output

# Two at a time: most tests are one thread of Python, and torch takes what is left.
test: $(installed)
	$(bin)/python -m pytest -n 2 --dist worksteal

lint: $(installed)
	$(bin)/ruff check src tests benchmarks docs
	$(bin)/mypy

docs: $(installed)
	$(bin)/sphinx-build --quiet --fail-on-warning --keep-going -b html docs site
	@echo "docs: open site/index.html"

setup: $(installed)

# torch comes first and alone: whatever is installed after it finds the pinned build in place.
$(installed): pyproject.toml constraints.txt $(native)
	@test -n "$(PYTHON)" $(call or_explain,"no Python 3.11 or newer was found; install one (Debian \
	and Ubuntu: apt install python3 python3-venv python3-dev) or name it: make PYTHON=/path/to/python3")
	@command -v $${CXX:-c++} >/dev/null || command -v g++ >/dev/null || echo "lutra set-up: no C++ \
	compiler was found (Debian and Ubuntu: apt install g++). Going on without the compiled CPU kernels: \
	results are the same, generating text is slow."
	@echo "lutra set-up: $$($(PYTHON) --version) into $(VENV), some minutes the first time"
	@$(PYTHON) -m venv $(VENV) $(call or_explain,"could not make the virtual environment $(VENV); if \
	ensurepip is missing: apt install python3-venv")
	@$(pip) install --quiet -c constraints.txt --upgrade pip $(call or_explain,"pip could not update \
	itself; see its message above (is a package index reachable?)")
	@$(pip) install --quiet -c constraints.txt torch $(call or_explain,"pip could not install the torch \
	that constraints.txt pins; see its message above and 'Installing torch' in README.md")
	@$(pip) install --quiet -c constraints.txt --build-constraint constraints.txt -e ".[dev]" \
	$(call or_explain,"pip could not install lutra or a package it needs; see its message above")
	@$(pip) install --quiet -c constraints.txt pytest-xdist $(call or_explain,"pip could not install \
	pytest-xdist; see its message above")
	@touch $@

clean:
	rm -rf $(VENV) site demo-output build dist
