# Two commands are enough on a fresh machine: `make demo` and `make test`. Each sets up what it needs.
# An environment that has torch already:  PYTHON=python3 make test   (nothing is installed then)
TORCH  := torch==2.13.0
TRITON := triton==3.7.1

ifdef PYTHON
READY :=
TOOLS :=
else
PYTHON := .venv/bin/python
READY  := .venv/ready
TOOLS  := .venv/tools
endif

.PHONY: setup demo test test-all lint bench gpu-check clean

setup: $(TOOLS)

# torch first, pinned: whatever is installed after it then finds it there and does not bring another build along.
.venv/ready: pyproject.toml
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet $(TORCH)
	[ "$$(uname -s)" != Linux ] || .venv/bin/python -m pip install --quiet $(TRITON)
	.venv/bin/python -m pip install --quiet --editable ".[plot,report]"
	touch .venv/ready

# What tests need beyond that: pytest, ruff, and every library that results are compared with.
.venv/tools: .venv/ready
	.venv/bin/python -m pip install --quiet --editable ".[dev]"
	touch .venv/tools

# The main job on text that needs no download: prepare, train, sample, ask the router what it knows, and draw the page.
# A quick look:  TRAIN=--max_steps=20 make demo
demo: $(READY)
	$(PYTHON) prepare_data.py stdlib
	$(PYTHON) train.py config/tiny_unipool.py --out_dir=out/demo --overwrite $(TRAIN)
	$(PYTHON) sample.py --out_dir=out/demo --prompt="def " --max_new_tokens=400 --temperature=0.8 --seed=1
	$(PYTHON) probe.py --out_dir=out/demo --random-router-from 12 --routing --page --tokens=4096

# Two workers where pytest-xdist is there; files stay whole, because their tests share trained models.
XDIST = $(shell $(PYTHON) -c "import xdist" 2>/dev/null && echo "-n 2 --dist loadfile")

test: $(TOOLS)
	$(PYTHON) -m pytest $(XDIST)

test-all: $(TOOLS)
	$(PYTHON) -m pytest $(XDIST) -m "slow or not slow"

lint: $(TOOLS)
	$(PYTHON) -m ruff check .

bench: $(READY)
	$(PYTHON) -m lab.bench all

gpu-check: $(TOOLS)
	$(PYTHON) -m lab.gpu_check

clean:
	rm -rf out data .venv .cache
