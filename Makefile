# `make demo` installs everything into .venv and runs the demo; `make test` checks the project.
# PYTHON=python3.12 chooses the interpreter.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CANDIDATES := $(or $(PYTHON),python3 python3.12 python3.11 python3.10)

# pip up to 25.2 reads the first name for builds too, later ones read the second: without it the
# build of fairseq's extensions would fetch a second torch.
# For the installation only: tests run pip in other folders, where this relative name is none.
$(STAMP): export PIP_CONSTRAINT := constraints.txt
$(STAMP): export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-matrix install clean

demo: $(STAMP)
	@$(BIN)/l2t demo

# MNIST=FOLDER MULTI30K=FOLDER, with their official files, has tests read those, too.
test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

# The tests under Python 3.10, 3.11 and 3.12, where those are here; see tests/matrix.sh.
test-matrix:
	@tests/matrix.sh

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@python=""; \
	for candidate in $(CANDIDATES); do \
	  if "$$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' \
	      2>/dev/null; then python="$$candidate"; break; fi; \
	done; \
	fail() { echo "make: l2t: $$1" >&2; exit 1; }; \
	[ -n "$$python" ] || fail "needs Python 3.10, 3.11 or 3.12, found none as: $(CANDIDATES); name one with PYTHON=/path/to/python3.11"; \
	command -v cc >/dev/null && command -v c++ >/dev/null \
	  || fail "needs a C and C++ compiler for fairseq's extensions; on Debian: apt-get install build-essential"; \
	"$$python" -c 'import ensurepip, venv' 2>/dev/null \
	  || fail "$$python has no venv module; on Debian: apt-get install python3-venv"; \
	"$$python" -c 'import os, sysconfig as s; open(os.path.join(s.get_paths()["include"], "Python.h"))' 2>/dev/null \
	  || fail "$$python has no header files; on Debian: apt-get install python3-dev"; \
	if [ -x $(BIN)/python ] && ! $(BIN)/python -c 'import pip' 2>/dev/null; then rm -rf $(VENV); fi; \
	[ -x $(BIN)/python ] || "$$python" -m venv $(VENV)
	@# fairseq 0.12.2, which Python 3.10 gets, has metadata that pip 24.1 and later refuse.
	@if $(BIN)/python -c 'import sys; sys.exit(sys.version_info >= (3, 11))'; then \
	  $(BIN)/python -m pip install --quiet 'pip<24.1'; fi
	@echo "installing into $(VENV) (some minutes, once)"
	$(BIN)/python -m pip install --quiet --editable '.[nmt,test]'
	@touch $(STAMP)

clean:
	rm -rf $(VENV) .matrix build *.egg-info
