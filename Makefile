# make demo   rank six shipped policies in the imagined Bridge and in the physics twin -> outputs/demo/report.html
# make test   lint, types, layer contract, tests
# make lint   the first three of these
#
# Each target makes its own environment in .venv first (only what is not there yet).

SHELL := /bin/bash
.DELETE_ON_ERROR:

VENV ?= .venv
PYTHON := $(VENV)/bin/python
UV := $(shell uv --version >/dev/null 2>&1 && command -v uv)
PYTHON312 := $(shell for p in python3.12 python3 python; do \
    $$p -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null && command -v $$p && break; done)

NO_PYTHON := echo >&2 "worldsim needs Python 3.12 with venv: sudo apt-get install -y python3.12 python3.12-venv \
(or install uv: https://docs.astral.sh/uv)"; exit 1

# One torch thread a process: two processes with two threads each on two cores are ten times slower.
export OMP_NUM_THREADS ?= 1
export MUJOCO_GL ?= egl

# Said before anything is downloaded if the libraries are absent, and after it if no context comes up all the same.
NO_GL := echo >&2 "No OpenGL for off-screen rendering (EGL): sudo apt-get install -y --no-install-recommends \
libegl1 libegl-mesa0 libgl1-mesa-dri"; exit 1
RENDERS = $(PYTHON) -c 'import mujoco; mujoco.GLContext(8, 8).free()' 2>/dev/null

DEMO_DIR ?= outputs/demo
DEMO_POLICIES ?= [bc_10_demos,bc_100_demos,bc_all_demos,act_30_demos,scripted,scripted_noise_80]
DEMO_TASKS ?= reach_target,put_carrot_on_plate
DEMO_EPISODES ?= 8

.PHONY: help demo test lint check-gl clean

help:
	@sed -n 's/^# //p' $(firstword $(MAKEFILE_LIST)) | head -3

demo: check-gl $(VENV)/.installed-run
	@$(RENDERS) || { $(NO_GL); }
	$(VENV)/bin/worldsim-rank 'policies=$(DEMO_POLICIES)' 'tasks=[$(DEMO_TASKS)]' num_episodes=$(DEMO_EPISODES) out=$(DEMO_DIR)
	@echo "Report: $(abspath $(DEMO_DIR)/report.html)"

test: check-gl lint
	@$(RENDERS) || { $(NO_GL); }
	$(PYTHON) -m pytest -n 2

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/ty check
	$(VENV)/bin/lint-imports --no-cache --no-logo

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .import_linter_cache

$(VENV)/.installed-run: EXTRAS := twin,lerobot
$(VENV)/.installed-dev: EXTRAS := all,dev
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(PYTHON)
ifdef UV
	uv pip install --quiet --python $(PYTHON) -c constraints.txt -e '.[$(EXTRAS)]'
else
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
endif
	@touch $@

$(PYTHON):
ifdef UV
	@uv venv --quiet --allow-existing --python $(or $(PYTHON312),3.12) $(VENV) || { $(NO_PYTHON); }
else ifdef PYTHON312
	@$(PYTHON312) -m venv $(VENV) >/dev/null || { rm -rf $(VENV); $(NO_PYTHON); }
else
	@$(NO_PYTHON)
endif

check-gl:
ifeq ($(MUJOCO_GL),egl)
	@libs=$$(PATH=$$PATH:/sbin ldconfig -p); grep -q 'libEGL\.so\.1 ' <<<"$$libs" \
	    && grep -Eq 'libEGL_(mesa|nvidia)\.so\.0 ' <<<"$$libs" || { $(NO_GL); }
endif
