# Everything runs in .venv, made when absent. Another torch: make test TORCH=torch==2.10.0
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.6.0
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*.h csrc/*/*)
CXX_FILES := $(filter %.cpp %.h %.cu %.cuh,$(SOURCES) $(wildcard tests/emulator/*))

.PHONY: demo test lint format kernels bench bench-check bench-readme gpu-check nano ablation clean

# Also on your own picture: make demo IMAGE=photo.png QUESTION="What color is the circle?"
demo: $(VENV)/installed
	$(BIN)/flashsloth demo $(if $(IMAGE),--image "$(IMAGE)") $(if $(QUESTION),--question "$(QUESTION)")

test: $(VENV)/installed
	$(BIN)/python -m flashsloth_ops env
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# Every GPU kernel compiled for sm_80, sm_90 and sm_100, checked, and compared with docs/kernels/kernels.json.
kernels: $(VENV)/installed
	env -u TRITON_INTERPRET $(BIN)/python -m flashsloth_ops kernels --compare docs/kernels/kernels.json

bench: $(VENV)/installed
	$(BIN)/python -m bench run

# Against the stored result of this device, where there is one. One thread and this tolerance suit machines that are
# shared; what is stored for it: python -m bench run --quick --threads 1
bench-check: $(VENV)/installed
	$(BIN)/python -m bench check --quick --threads 1 --if-any --tolerance 30%

# The table of README.md from stored results, of one device where there are several: make bench-readme DEVICE=<folder>
bench-readme: $(VENV)/installed
	$(BIN)/python -m bench report --readme $(if $(DEVICE),--device $(DEVICE)) > /dev/null

# On a GPU: builds with CUDA, tests, compares, checks memory, times; under eight minutes, one JSON.
gpu-check: $(VENV)/installed
	$(BIN)/python -m bench gpu-check

# The small model from nothing, into nano/: pictures, tower, two stages. Hours on two CPU cores; goes on after a stop.
nano: $(VENV)/installed
	$(BIN)/python -m flashsloth.nano --out nano

# Then other ways to compress, and embedded queries, on its weights: nano/ablation/ablation.md.
ablation: $(VENV)/installed
	$(BIN)/python -m flashsloth.nano --out nano --until ablation

clean:
	rm -rf $(VENV) build dist *.egg-info flashsloth_ops/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch first and pinned: whatever asks for plain torch later finds it, and the build uses this one. A CUDA torch brings
# its own triton; beside one for CPUs it is there for the interpreter and the report of kernels.
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check "$(TORCH)"
	if [ "$$(uname)" = Linux ] && ! $(BIN)/python -c "import triton" 2>/dev/null; then \
		$(BIN)/python -m pip install -q --disable-pip-version-check "$(TRITON)"; fi
	$(BIN)/python -m pip install -q --disable-pip-version-check "setuptools>=77" "ninja>=1.11" "pybind11>=2.12"
	touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml setup.py $(SOURCES)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation -e ".[test,lint]"
	touch $@
