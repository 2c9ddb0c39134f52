# make demo      set up if needed, then the whole way: draw photos, prepare, inspect, train, predict, evaluate
# make test      set up if needed, then the everyday tests
# make test-all  with the slow tests
# make check     lint and types
# make format    format and fix lint
# make s3        a real S3 server on this machine, to try things with
# make cluster   a real Ray cluster of three nodes on this machine, with a token and the dashboard
# make chaos     kill what jobs run on at random moments, and compare (root; about half an hour)
# make chromium  Debian's browser, which the test of the web page drives (without it that test is skipped)
# make label-studio  tests with a running Label Studio, installed into an environment of its own
# make labelme   tests with labelme 6 and 7, each in an environment of its own
# make venv      the set-up alone; PIP_ARGS="..." passes options to pip
# make wheel     build the package
# make clean     remove what the commands above made, except .venv*
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# In two processes, each with whole files. The others use Ray, of which one runs at a time.
UNIT_TESTS := -n 2 --dist loadfile tests/unit tests/test_docs.py tests/test_readme.py
RUN := --config configs/demo.yaml
# labelme 7 needs Python 3.12 or newer.
PYTHON_LABELME_7 ?= $(PYTHON)
# What `samray labelme` imports, without torch and Ray.
LABELME_SAMRAY := boto3 cloudpathlib filelock pydantic pyyaml requests
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)

.PHONY: demo test test-all check format s3 cluster chaos chromium label-studio labelme wheel venv clean

demo: $(STAMP)
	rm -rf demo
	$(BIN)/python -m jobs.sample_data $(RUN)
	$(BIN)/python -m jobs.prepare $(RUN)
	$(BIN)/python -m jobs.inspect $(RUN)
	$(BIN)/python -m jobs.train $(RUN)
	$(BIN)/python -m jobs.predict $(RUN) --point 120 80
	$(BIN)/python -m jobs.evaluate $(RUN)
	@echo
	@echo "base: tiny as it comes with samray; tuned: the best epoch, chosen on the val split. Look at:"
	@echo "  demo/report/report.html                     base against tuned, in pictures"
	@echo "  demo/prepared/overlays/                     the annotations"
	@echo "  demo/look/                                  what the model was shown"
	@echo "  demo/prediction/sample_00000_overlay.png    one click, one mask"

test: $(STAMP)
	$(BIN)/python -m pytest -q -m "not slow" $(UNIT_TESTS)
	$(BIN)/python -m pytest -q -m "not slow" tests/integration

test-all: $(STAMP)
	$(BIN)/python -m pytest -q $(UNIT_TESTS)
	$(BIN)/python -m pytest -q tests/integration

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

s3: $(STAMP)
	$(BIN)/python tests/s3.py

cluster: $(STAMP)
	$(BIN)/python tests/local_cluster.py

chaos: $(STAMP)
	$(BIN)/python benchmarks/chaos.py

chromium:
	command -v chromium || { $(SUDO) apt-get update -qq -o Acquire::Retries=5 && \
	  $(SUDO) apt-get install -y -qq -o Acquire::Retries=5 --no-install-recommends chromium; }

label-studio: $(STAMP) .venv-label-studio/.installed
	SAMRAY_LABEL_STUDIO=$(CURDIR)/.venv-label-studio/bin/label-studio \
	  $(BIN)/python -m pytest -q tests/integration/test_label_studio.py

labelme: $(STAMP) .venv-labelme-6/.installed .venv-labelme-7/.installed
	SAMRAY_LABELME=$(CURDIR)/.venv-labelme-6/bin/python:$(CURDIR)/.venv-labelme-7/bin/python \
	  $(BIN)/python -m pytest -q tests/integration/test_labelme_tool.py

.venv-label-studio/.installed:
	$(PYTHON) -m venv .venv-label-studio
	.venv-label-studio/bin/python $(PIP_INSTALL) label-studio==1.23.2
	touch $@

.venv-labelme-6/.installed:
	$(PYTHON) -m venv .venv-labelme-6
	.venv-labelme-6/bin/python $(PIP_INSTALL) labelme==6.3.1 $(LABELME_SAMRAY)
	touch $@

.venv-labelme-7/.installed:
	$(PYTHON_LABELME_7) -m venv .venv-labelme-7
	.venv-labelme-7/bin/python $(PIP_INSTALL) labelme==7.9.1 $(LABELME_SAMRAY)
	touch $@

wheel: $(STAMP)
	$(BIN)/python -m build --wheel

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf demo build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
