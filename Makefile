# make demo and make test do all their own set-up; they need Python 3.11+, nothing else.
PYTHON ?= python3
BIN := .venv/bin

# Without an NVIDIA driver PyTorch's CPU build does: the one on PyPI brings gigabytes of CUDA.
# Where that index cannot be reached, pip goes on with the others.
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi),,--extra-index-url https://download.pytorch.org/whl/cpu)

.PHONY: demo test soak fuzz bench-cpu bench-traffic bench-overhead bench-gpu lint format proto config metrics clean

demo: .venv/installed
	$(BIN)/python demo/run.py $(if $(BASE),--base $(BASE))

test: .venv/installed
	$(BIN)/python demo/fetch_base.py
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile

soak: .venv/installed
	$(BIN)/python benchmarks/soak.py $(if $(SECONDS),--seconds $(SECONDS))

fuzz: .venv/installed
	$(BIN)/python benchmarks/fuzz.py $(if $(COUNT),--count $(COUNT))

bench-cpu: .venv/installed
	$(BIN)/python benchmarks/cpu.py

bench-traffic: .venv/installed
	$(BIN)/python benchmarks/traffic.py

bench-overhead: .venv/installed
	$(BIN)/python benchmarks/overhead.py

bench-gpu: .venv/installed
	$(BIN)/python benchmarks/gpu.py

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

proto: .venv/installed
	$(BIN)/python -m grpc_tools.protoc -Ispieldose_proto=proto/spieldose_proto \
		--python_out=proto --pyi_out=proto --grpc_python_out=proto spieldose_proto/inference.proto

config: .venv/installed
	$(BIN)/python -P -m spieldose_server.config_file > server/spieldose.toml

metrics: .venv/installed
	$(BIN)/python -P -m spieldose_server.metrics_table > docs/METRICS.md
	$(BIN)/python docs/grafana/dashboard.py > docs/grafana/spieldose.json

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "expected Python 3.11 or newer, got " + sys.version)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-deps --retries 0 $(TORCH_INDEX) --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build
