# What one does with this tree; each target sets up what it needs, in build/ (VMM_BUILD=DIR: there).
.PHONY: help build lint test test-kvm test-linux test-migrate bench run guest clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' Makefile

build: ## the release binary: target/x86_64-unknown-linux-gnu/release/vmm (PROFILE=dev: debug/vmm)
	cargo build --profile $(or $(PROFILE),release) --bin vmm

run: build ## sit at the shell of a microVM (KERNEL=PATH: boot that kernel; PROFILE=dev: by that build)
	@resources/run

test: ## every test, each where it can run (see tests/run)
	@tests/run all

test-kvm: ## the tests that need no stock kernel, on /dev/kvm as it is
	@tests/run plain

test-linux: ## the tests that boot stock kernels, without migration
	@tests/run linux $(basename $(notdir $(wildcard tests/linux*.rs)))

test-migrate: ## migration of stock guests, on one host and between two
	@tests/run linux $(basename $(notdir $(wildcard tests/migrate*.rs tests/hosts_*.rs)))

bench: ## vmm beside QEMU in one run, as tables (BENCH_ONLY="boot ...", BENCH_RUNS=N; see tests/bench/run)
	@tests/bench/run

lint: ## formatting, and clippy with warnings as errors
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --quiet -- -D warnings

guest: ## Debian's stock kernels, their initramfs, and a root file system
	@resources/guest/build

clean: ## remove what was built; what was downloaded stays (rm -r build removes it too)
	cargo clean
	rm -rf $${VMM_BUILD:-build}/guest $${VMM_BUILD:-build}/guest.* $${VMM_BUILD:-build}/host \
		$${VMM_BUILD:-build}/run.*
