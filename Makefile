# Two commands are enough on a fresh machine: `make demo` and `make test`. Each sets up what it needs.
# An environment that has torch already:  PYTHON=python3 make test   (nothing is installed then)
TORCH  := torch==2.13.0
TRITON := triton==3.7.1

# Threads that wait asleep: where other programs want the cores too, spinning ones slow a run down many times.
export OMP_WAIT_POLICY ?= passive

ifdef PYTHON
READY :=
else
PYTHON := .venv/bin/python
READY  := .venv/ready
endif

.PHONY: setup demo test test-all lint bench gpu-check clean

setup: $(READY)

# torch first, pinned: whatever is installed after it then finds it there and does not bring another build along.
.venv/ready: pyproject.toml
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet $(TORCH)
	[ "$$(uname -s)" != Linux ] || .venv/bin/python -m pip install --quiet $(TRITON)
	.venv/bin/python -m pip install --quiet --editable ".[dev]"
	touch .venv/ready

# The main job on text that needs no download: prepare, train, sample, and ask the router what it knows.
demo: $(READY)
	$(PYTHON) prepare_data.py stdlib
	$(PYTHON) train.py config/tiny_unipool.py --out_dir=out/demo --overwrite
	$(PYTHON) sample.py --out_dir=out/demo --prompt="def " --max_new_tokens=400 --temperature=0.8 --seed=1
	$(PYTHON) probe.py --out_dir=out/demo --random-router-from --routing --tokens=8192

# Two workers where pytest-xdist is there; files stay whole, because their tests share trained models.
XDIST = $(shell $(PYTHON) -c "import xdist" 2>/dev/null && echo "-n 2 --dist loadfile")

test: $(READY)
	$(PYTHON) -m pytest $(XDIST)

test-all: $(READY)
	$(PYTHON) -m pytest $(XDIST) -m "slow or not slow"

lint: $(READY)
	$(PYTHON) -m ruff check .

bench: $(READY)
	$(PYTHON) bench.py all

gpu-check: $(READY)
	$(PYTHON) bench.py gpu_check

clean:
	rm -rf out data .venv .cache
