# BudgetDraft: make lab, make test, make notebooks. Needs Python >= 3.11, make and pip.
#
# Every target prepares what it needs: a virtual environment in $(VENV), the library with
# its pinned dependencies, and the model and texts, all only once.
#
#   make lab PYTHON=python3.12          use another Python
#   make test VENV=/path/to/environment use another place for the environment

PYTHON ?= python3
VENV ?= .venv
PROFILE ?= quick
# Processes that tests and notebooks are shared among, one thread each.
WORKERS ?= 2
# More options for JupyterLab, for example LAB_OPTIONS="--no-browser --port=8899".
LAB_OPTIONS ?=
# The same for the dashboard, for example VOILA_OPTIONS="--no-browser --port=8866".
VOILA_OPTIONS ?=
PIP_VERSION := 26.3

BIN := $(VENV)/bin
PY := $(BIN)/python
INSTALLED := $(VENV)/.bdlib-installed
LESSONS := $(wildcard notebooks)
DASHBOARD := notebooks/20_instructor_dashboard.ipynb
# Defaults of JupyterLab in this environment alone: never ask about news, never look for any.
LAB_DEFAULTS := $(VENV)/share/jupyter/lab/settings/overrides.d/bdlib.json

# Where nothing can be written to the home directory, what would go there goes into the environment.
ifeq ($(shell test -w "$$HOME" && echo yes),)
PRIVATE := $(abspath $(VENV))/home
export JUPYTER_CONFIG_DIR ?= $(PRIVATE)/jupyter
export JUPYTER_DATA_DIR ?= $(PRIVATE)/jupyter-data
export JUPYTER_RUNTIME_DIR ?= $(PRIVATE)/jupyter-runtime
export IPYTHONDIR ?= $(PRIVATE)/ipython
export MPLCONFIGDIR ?= $(PRIVATE)/matplotlib
export TRITON_HOME ?= $(PRIVATE)
endif

# The pinned pip is the one that fetches, too: it resumes a broken download.
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help env fetch lab dashboard test notebooks html lint clean

help: ## Say what the targets do
	@echo "BudgetDraft: sparse-KV speculative decoding, in notebooks"
	@echo
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1|\2/' | \
		while IFS='|' read -r target text; do printf '%-18s %s\n' "$$target" "$$text"; done

env: $(INSTALLED) ## Make the virtual environment and install the library in it
	@echo "==> environment ready: $(VENV)"

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "error: Python 3.11 or newer is needed, but $(PYTHON) is %d.%d; try: make PYTHON=python3.12 ..." % v[:2])'
	@echo "==> environment: $(VENV)"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "==> pip $(PIP_VERSION)"
	@$(PY) -m pip install --quiet "pip==$(PIP_VERSION)"
	@echo "==> bdlib and its pinned dependencies (the first time this downloads a lot)"
	@$(PY) -m pip install --resume-retries 10 -e ".[dev]"
	@mkdir -p $(dir $(LAB_DEFAULTS))
	@echo '{"@jupyterlab/apputils-extension:notification": {"fetchNews": "false"}}' > $(LAB_DEFAULTS)
	@touch $@

fetch: env ## Download and verify the model and the texts (about 140 MB, once)
	@echo "==> model and texts"
	@$(PY) -m bdlib fetch

lab: fetch ## Open the lessons in JupyterLab
	@echo "==> JupyterLab; stop it with Ctrl-C"
	@cd notebooks && "$(abspath $(BIN))/jupyter" lab \
		--LabApp.extension_manager=readonly --LabApp.news_url=None \
		--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate \
		$(if $(filter 0,$(shell id -u)),--allow-root) $(LAB_OPTIONS) \
		$(notdir $(wildcard notebooks/00_start_here.ipynb))

dashboard: fetch ## Serve the instructor's dashboard as a page of its own
	@echo "==> the dashboard; it fills up within seconds; stop it with Ctrl-C"
	@"$(BIN)/voila" $(DASHBOARD) --theme=light --progressive_rendering=True \
		--VoilaExecutor.skip_cells_with_tag=live-run $(VOILA_OPTIONS)

test: fetch ## Run all tests and every notebook, offline
	@echo "==> tests, then every notebook (nbval and papermill)"
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist loadfile \
		--nbval --nbval-current-env --nbval-cell-timeout=600 tests $(LESSONS)

notebooks: fetch ## Run every lesson with papermill (PROFILE=quick, cpu or gpu)
	@echo "==> lessons, profile $(PROFILE)"
	@$(PY) -m bdlib notebooks --profile $(PROFILE)

html: env ## Write all lessons as static pages to build/site (nothing is run)
	@echo "==> pages"
	@$(PY) -m bdlib html

lint: env ## Check style and formatting, and the stored form of the notebooks
	@echo "==> ruff, notebooks"
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m bdlib notebooks --check

clean: ## Remove what runs leave behind (keeps the environment, the model and the texts)
	@echo "==> removing build output and caches"
	@rm -rf build dist bdlib.egg-info .pytest_cache .ruff_cache
	@find . -path ./$(VENV) -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) \
		-prune -exec rm -rf {} +
