# Everything starts from a clean clone with Python >= 3.11, pip and make.
PYTHON ?= python3
VENV ?= .venv
PROMPT ?= a red ball moving right
OUTPUT ?= outputs/video.mp4
export PROMPT OUTPUT
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: video results test lint wheel clean

video: $(VENV)/.base ## make a video and a report: make video PROMPT="a red ball moving right"
	@$(VENV)/bin/generate-video --prompt "$$PROMPT" --output "$$OUTPUT"

results: $(VENV)/.base ## measure this machine into docs/results: kernels, whole steps, single calls
	$(VENV)/bin/dit-accel bench all --output docs/results

test: $(VENV)/.dev ## run the test suite
	$(VENV)/bin/pytest -n auto --dist loadfile

lint: $(VENV)/.dev ## ruff, and mypy on the package as it is installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	rm -rf build/typecheck && $(PIP) --no-deps --target build/typecheck .
	MYPYPATH=build/typecheck $(VENV)/bin/mypy -p dit_accel

wheel: $(VENV)/.dev ## build the wheel into dist/
	rm -rf dist && $(VENV)/bin/python -m build --wheel --outdir dist .

$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools torch
	$(PIP) -e .
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
