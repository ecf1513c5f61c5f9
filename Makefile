# One verb per chore, the same in CI and in the documentation. Needs python3 (3.10 or newer) and cargo; everything else
# goes into the virtual environment, nothing is installed outside it.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:

PYTHON ?= python3
VENV ?= .venv
override VENV := $(abspath $(VENV))
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# The compiler of the CUDA kernels, for tests without a GPU.
NVRTC := tests/cuda/requirements.txt
# One profile for lints and tests, so that dependencies are compiled once.
PROFILE := --profile dev-fast
export PYO3_PYTHON := $(BIN)/python

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(READY) ## Make the virtual environment with all tools of development

$(READY): pyproject.toml $(NVRTC)
	$(PYTHON) -c 'import sys; sys.exit("pyrformer needs Python 3.10 or newer: set PYTHON" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --group dev -r $(NVRTC)
	touch $@

.PHONY: build
build: $(READY) ## Build the release wheel into dist/ and install it
	rm -f dist/pyrformer-*.whl
	$(BIN)/maturin build --release --out dist
	$(BIN)/python -m pip uninstall -qq --yes pyrformer
	$(BIN)/python -m pip install --quiet dist/pyrformer-*.whl

.PHONY: develop
develop: $(READY) ## Build with checks and install so that edits of Python files are live
	VIRTUAL_ENV=$(VENV) $(BIN)/maturin develop $(PROFILE)

.PHONY: test
test: lint test-rust build test-python docs ## Lints, Rust tests, the Python tests against the installed release wheel, the site

.PHONY: test-rust
test-rust: $(READY) ## Rust tests only
	cargo test --workspace $(PROFILE)

# Tests run in an empty folder, so that `import pyrformer` cannot find the source tree.
ELSEWHERE := work=$$(mktemp -d); trap 'rm -rf "$$work"' EXIT; cd "$$work"
PYTEST := $(BIN)/pytest -c $(CURDIR)/pyproject.toml --rootdir $(CURDIR)

.PHONY: test-python
test-python: $(READY) ## Python tests only, on all cores, against what is installed
	$(ELSEWHERE); $(BIN)/python -m mypy.stubtest pyrformer._core
	$(ELSEWHERE); $(PYTEST) -n auto $(CURDIR)/tests

.PHONY: fuzz
fuzz: $(READY) ## A million damaged files; tokenizers against the `tokenizers` library on 120,000 generated strings
	$(ELSEWHERE); PYRFORMER_FUZZ_FILES=50000 $(PYTEST) -s $(CURDIR)/tests/fuzz/test_formats.py
	$(ELSEWHERE); PYRFORMER_FUZZ=15000 $(PYTEST) $(CURDIR)/tests/text/test_fuzz.py

.PHONY: torture
torture: build ## Kill training, break its files, read damaged ones; see docs/reliability.md
	$(ELSEWHERE); PYRFORMER_TORTURE=25 $(PYTEST) -s $(CURDIR)/tests/train/test_torture.py \
		$(CURDIR)/tests/train/test_every_step.py $(CURDIR)/tests/fuzz

# The sanitizers' runtimes come with the stable toolchain; a target must be named, or build scripts are sanitized, too.
HOST = $(shell rustc -vV | sed -n 's/^host: //p')
# What Miri runs in minutes: the kernels without vectors, and what owns memory.
MIRI := gemm::tests::portable_kernels gemm::tests::shapes_must_fit turns

.PHONY: sanitize
sanitize: ## Rust tests under AddressSanitizer; a choice of them under Miri (rustup +nightly component add miri rust-src)
	RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address CARGO_TARGET_DIR=target/sanitize \
		cargo test --workspace --exclude pyrformer-python --target $(HOST) $(PROFILE) --lib --tests
	cargo +nightly miri test -p pyrformer-cpu -p pyrformer-search --lib -- $(MIRI)

.PHONY: lint
lint: $(READY) ## Formatting, lints and types of both languages
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets $(PROFILE) -- -D warnings
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

.PHONY: bench
bench: build ## Run all benchmarks; each prints a table
	for file in $(wildcard benchmarks/bench_*.py); do $(BIN)/python "$$file"; done

.PHONY: demo
demo: build ## Train a small model on eight plays of Shakespeare and let it speak
	$(BIN)/pyrformer train examples/shakespeare/train.txt --valid examples/shakespeare/valid.txt \
		--config examples/shakespeare/char.toml --out runs/shakespeare --overwrite
	$(BIN)/pyrformer sample runs/shakespeare $$'OTHELLO.\n' --max-new-tokens 300 --seed 1

.PHONY: same-or-not
same-or-not: build ## Train a GPT, a BERT and an XLNet on one text and compare them: docs/same-or-not.md
	PATH="$(BIN):$$PATH" PYTHON=$(BIN)/python examples/same-or-not/run.sh

.PHONY: examples
examples: build ## Run the examples with polars, pandas, DuckDB and datasets, which this installs
	$(BIN)/python -m pip install --quiet --group examples
	$(ELSEWHERE); $(PYTEST) $(CURDIR)/tests/pipeline/test_examples.py

# Warnings are errors: a link that leads nowhere, a name that the reference does not find.
.PHONY: docs
docs: $(READY) ## Build the documentation site into target/site, with what is installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

.PHONY: rust-docs
rust-docs: ## Build the Rust documentation into target/doc
	cargo doc --workspace --no-deps --document-private-items

.PHONY: wheel-check
wheel-check: build ## Build the wheel and test what is in it
	$(ELSEWHERE); $(PYTEST) $(CURDIR)/tests/packaging

.PHONY: clean
clean: ## Remove everything that is built; runs/ stays
	rm -rf $(VENV) dist target .mypy_cache .pytest_cache .ruff_cache .hypothesis pyrformer/_core*.so
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
