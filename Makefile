# Everything a developer needs, in one place. `make` alone lists it.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
# The steps of `make test` are in order, and cargo uses all processors by itself.
.NOTPARALLEL:

# Where scripts/test-deps.sh puts tools; the end-to-end tests look there.
export DUET_TEST_TOOLS := $(CURDIR)/target/test-tools/venv/bin
# Cargo.lock is part of the source: continuous integration must not change it.
LOCKED := $(if $(CI),--locked,)

.PHONY: help
help: ## lists the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

.PHONY: build
build: ## all binaries, optimised, in target/release
	cargo build --workspace --bins --release $(LOCKED)
	cargo build -p duet-proxy --bins --release $(LOCKED) # by itself it is without what only others need

.PHONY: test
test: AHEAD := yes
test: deps lint test-rust test-k8s test-instructions doc ## everything that continuous integration checks

.PHONY: deps
deps: ## what the tests need besides Rust; see scripts/test-deps.sh
	scripts/test-deps.sh

.PHONY: lint
lint: ## format and lints, as errors
	cargo fmt --all --check
	cargo clippy --workspace --all-targets $(LOCKED) -- -D warnings
	@if command -v shellcheck >/dev/null; then shellcheck scripts/*.sh .ci/run; \
	else echo "shellcheck is not installed: scripts are not checked"; fi

# What counts instructions; Debian has nginx where not everybody looks.
COUNTERS := command -v callgrind_control >/dev/null && command -v h2load >/dev/null && PATH="$$PATH:/usr/sbin" command -v nginx >/dev/null

# The end-to-end tests start the binaries, which tests of another package do not build by themselves. And they wait more than
# they compute: in `make test`, what `test-instructions` needs is built meanwhile, at the lowest priority.
.PHONY: test-rust
test-rust: ## unit and end-to-end tests
	cargo build --workspace --bins $(LOCKED)
	cargo test --workspace --no-run $(LOCKED)
	@if [[ -n "$(AHEAD)" ]] && $(COUNTERS); then \
	  nice -n 19 cargo build --release -p duet-proxy --bins --quiet $(LOCKED) & ahead=$$!; \
	fi; \
	cargo test --workspace $(LOCKED) || { kill $${ahead:-} 2>/dev/null || true; exit 1; }

.PHONY: test-k8s
test-k8s: ## builds and checks the manifests in k8s/
	@if [[ -x "$$DUET_TEST_TOOLS/kubernetes-validate" ]]; then \
	  "$$DUET_TEST_TOOLS/python" tests/k8s/validate.py; \
	elif [[ "$${CI:-}" == true ]]; then \
	  echo "the tools for k8s/ are missing: run make deps" >&2; exit 1; \
	else \
	  echo "SKIPPED: the tools for k8s/ are missing; run make deps"; \
	fi

.PHONY: test-instructions
test-instructions: ## counts the instructions of a request, and compares with bench/instructions.json
	@if $(COUNTERS); then \
	  cargo build --release -p duet-proxy --bins $(LOCKED) && cargo build --workspace --bins $(LOCKED) && \
	  bench/instructions --duet target/debug/duet; \
	elif [[ "$${CI:-}" == true ]]; then \
	  echo "valgrind, nginx or nghttp2-client is missing: run make deps" >&2; exit 1; \
	else \
	  echo "SKIPPED: instruction counts need valgrind, nginx and nghttp2-client; run make deps"; \
	fi

.PHONY: bench
bench: ## measures Duet beside its peers (15 minutes); see bench/README.md
	bench/run

.PHONY: bench-events
bench-events: ## measures Duet's events beside JetStream (10 minutes); see bench/README.md
	bench/events

.PHONY: doc
doc: ## the code's documentation, in target/doc
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps $(LOCKED)

.PHONY: fmt
fmt: ## formats the code
	cargo fmt --all

.PHONY: deny
deny: ## licences, advisories and sources of dependencies; needs cargo-deny
	cargo deny check

.PHONY: images
images: ## container images, with docker or what DOCKER names
	version=$$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1); \
	for image in duet duet-proxy shop; do \
	  "$${DOCKER:-docker}" build --target "$$image" --tag "$$image:$$version" .; \
	done

.PHONY: clean-state
clean-state: ## removes what `duet up` keeps: identities, events, logs
	find . -path ./target -prune -o -type d -name .duet -prune -print -exec rm -rf {} +
