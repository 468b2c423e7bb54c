# make demo   train CLIP on emoji in minutes, from nothing, and find combinations that it never saw
# make demo-blip2   the same for BLIP-2: a tower, both stages, captions of held-out pictures
# make demo-llava   for LLaVA: a tower, both stages, dialogues about held-out pictures
# make test   the tests, from nothing          make check  lint, format, types
# make bench  the benchmarks of this machine   make gpu    on CUDA: smoke, kernel times, tests, benchmarks, in 8 minutes
# make static what the kernels compile to for sm_80, sm_90 and sm_100, and what that predicts, without a GPU
# make docs   the pages' tables from committed JSON, docs/api.md from the docstrings
PYTHON ?= python3
VENV   ?= .venv
RUN    := $(VENV)/bin/python
DEMO   ?= runs/demo
GPU    ?= gpu
GPU_SECONDS ?= 440
JOBS   ?= 2

.PHONY: demo demo-blip2 demo-llava test check bench static docs docs-tables gpu clean
.DELETE_ON_ERROR:

# DeepSpeed builds from source and needs torch to be there first.
$(VENV)/installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -c constraints.txt torch numpy setuptools wheel ninja packaging
	DS_BUILD_OPS=0 $(RUN) -m pip install -q --no-build-isolation -c constraints.txt -e '.[train,test]'
	touch $@

demo: $(VENV)/installed
	$(VENV)/bin/mmcore train clip --data emoji --model tiny --epochs 40 --lr 2e-3 --ema 0.98 --out $(DEMO)
	@echo "next: $(VENV)/bin/mmcore prove all, which shows the same of every system, beside a control that cannot know"

demo-blip2: $(VENV)/installed
	$(VENV)/bin/mmcore train clip --data digits --model tiny --epochs 45 --lr 1e-3 --ema 0.99 --out $(DEMO)-blip2/tower
	$(VENV)/bin/mmcore train blip2-stage1 --data digits --vision $(DEMO)-blip2/tower --epochs 8 --batch-size 64 \
	    --lr 1e-3 --out $(DEMO)-blip2/stage1
	$(VENV)/bin/mmcore train blip2-stage2 --data digits --from $(DEMO)-blip2/stage1 --llm tiny --prompt Caption: \
	    --epochs 10 --batch-size 64 --lr 1e-3 --ema 0.99 --out $(DEMO)-blip2/stage2
	$(VENV)/bin/mmcore eval vqa $(DEMO)-blip2/stage2

# On pictures of things, tuxpaint's stamps, where the package of them can be fetched, else on scans of digits.
demo-llava: $(VENV)/installed
	@if $(RUN) -c "import sys; sys.tracebacklimit = 0; from mmcore.data.sources.stamps import find_stamps; find_stamps(None)"; \
	then data=stamps epochs=40; \
	else echo "no stamps here: the demo is on digits"; data=digits epochs=20; fi; \
	set -ex; run=$(DEMO)-llava; common="--data $$data --val-fraction 0.2 --lr 1e-3"; \
	$(VENV)/bin/mmcore train clip $$common --model tiny --epochs $$epochs --batch-size 128 --ema 0.99 --out $$run/tower; \
	$(VENV)/bin/mmcore train llava-stage1 $$common --vision $$run/tower --llm tiny --llm-steps 60 --epochs 2 \
	    --batch-size 32 --max-answer 16 --out $$run/stage1; \
	$(VENV)/bin/mmcore train llava-stage2 $$common --from $$run/stage1 --epochs 8 --batch-size 32 --max-answer 16 \
	    --out $$run/stage2

# The oldest triton that is promised, beside the one that torch came with: the launch tables are compiled under both.
$(VENV)/triton-3.6: $(VENV)/installed
	rm -rf $@.part
	$(RUN) -m pip install -q --no-deps --target $@.part triton==3.6.0
	mv $@.part $@

# One thread a process: the tests are many small calls.
test: $(VENV)/installed $(VENV)/triton-3.6
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist worksteal

check: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/basedpyright --pythonpath $(RUN)
	$(RUN) -m tests.lines

bench: $(VENV)/installed
	$(RUN) -m pytest bench/ --benchmark-json=bench/results/latest.json

static: $(VENV)/installed
	$(RUN) -m bench static --json
	$(RUN) -m bench tables kernels/README.md

docs: docs-tables
	$(RUN) docs/generate.py

docs-tables: $(VENV)/installed
	$(RUN) -m bench tables README.md kernels/README.md docs/*.md

# Needs a CUDA device and an environment that has torch for it; installs nothing.
gpu:
	$(PYTHON) -c "import sys, torch; torch.cuda.is_available() or sys.exit('make gpu needs a CUDA device and a torch built for it')"
	PYTHONPATH=.:kernels $(PYTHON) -m bench.gpu bench/results/$(GPU) --seconds $(GPU_SECONDS)

clean:
	rm -rf $(VENV) build dist *.egg-info
