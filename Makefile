# Two commands do everything on a machine that has only Python: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# what `make bench` measures on: a folder of categories and a float network with ImageNet weights
DATA   ?= ../shared/data
BACKBONE ?= ../shared/weights/mcunet_in3_imagenet_f32.onnx
# and, for the trained students, a MobileNetV2 and the figures to compare with
MOBILENET ?= ../shared/weights/mobilenet_v2_1.0_imagenet_dequant.onnx
PUBLISHED ?= ../shared/reference/paste_mvtec_per_category.csv
STAMP  := $(VENV)/.installed
DEV    := $(VENV)/.developer

# Debian packages that compile the firmware and run it; root, or sudo
FIRMWARE_TOOLS := gcc-arm-none-eabi libnewlib-arm-none-eabi qemu-system-arm

.PHONY: demo test test-slow lint types check bench wheel firmware-tools fuzz clean

demo: $(STAMP)
	$(BIN)/tinyvad demo --out demo-data
	$(BIN)/tinyvad build --data demo-data --target cortex-m7 --out demo-build
	$(BIN)/tinyvad eval demo-build --data demo-data
	@echo "report: demo-build/report.html"

test: $(DEV)
	$(BIN)/python -m pytest -n auto

test-slow: $(DEV)
	$(BIN)/python -m pytest -n auto -m slow --override-ini addopts="-q --strict-markers"

lint: $(DEV)
	$(BIN)/ruff check .

types: $(DEV)
	$(BIN)/mypy

check: lint types test

bench: $(DEV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[bench]"
	$(BIN)/python benchmarks/bench_engine.py --out benchmarks/results/engine.md
	$(BIN)/python benchmarks/bench_search.py --out benchmarks/results/search.md
	$(BIN)/python benchmarks/methods_table.py --data $(DATA) --backbone $(BACKBONE) --out benchmarks/results
	$(BIN)/python benchmarks/build_table.py --data $(DATA) --backbone auto --backbone $(BACKBONE) --out benchmarks/results
	$(BIN)/python benchmarks/kernel_instructions.py --core cortex-m7 --core cortex-m4 --core cortex-m33 --core cortex-m3 \
	  --core cortex-m0plus --core cortex-m55 --sums --out benchmarks/results/kernels.md
	$(BIN)/python benchmarks/firmware_table.py --data $(DATA) --category bottle --category toothbrush --category casting \
	  --also bottle,rp2040 --also bottle,corstone-300 --also bottle,stm32f746,320x240-rgb565 --out benchmarks/results
	$(BIN)/python benchmarks/learning.py --out benchmarks/results/learning.md
	$(BIN)/tinyvad bench continual benchmarks/grids/six_products.toml
	$(BIN)/tinyvad bench continual benchmarks/grids/drift.toml
	$(BIN)/tinyvad bench continual benchmarks/grids/paste_replay.toml
	$(BIN)/python benchmarks/training_speed.py --out benchmarks/results/training_speed.md
	$(BIN)/python benchmarks/students_table.py --data $(DATA) --mcunet $(BACKBONE) --mobilenet $(MOBILENET) --published $(PUBLISHED) \
	  --out benchmarks/results
	$(BIN)/python benchmarks/replay_forms.py --weights $(BACKBONE) --data $(DATA) --out benchmarks/results
	$(BIN)/python benchmarks/feature_selective.py --data $(DATA) --products bottle,toothbrush --out benchmarks/results/feature_selective.md
	$(BIN)/python benchmarks/backbone_table.py --data $(DATA) --teacher $(BACKBONE) --out benchmarks/results

firmware-tools:
	@if command -v arm-none-eabi-gcc >/dev/null && command -v qemu-system-arm >/dev/null; then echo "firmware tools: there"; \
	elif [ "$$(id -u)" = 0 ]; then apt-get update -q && apt-get install -y -q --no-install-recommends $(FIRMWARE_TOOLS); \
	else sudo apt-get update -q && sudo apt-get install -y -q --no-install-recommends $(FIRMWARE_TOOLS); fi

# libFuzzer on tvad_open and tvad_score; needs clang and its compiler-rt (Debian: clang libclang-rt-14-dev)
FUZZ_SECONDS ?= 600
FUZZ_SOURCES := $(addprefix export/runtime/tvad_,bank.c bank_kind.c crc.c embed.c route.c score.c score_centres.c \
                score_core.c score_linear.c score_padim.c score_pairs.c score_pq.c triangle.c)
fuzz: $(DEV)
	mkdir -p build/fuzz/corpus
	$(BIN)/python tests/small_banks.py build/fuzz/seeds
	clang -std=c99 -D_POSIX_C_SOURCE=200112L -g -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all \
	  -Iexport/runtime export/fuzz/fuzz_bank.c $(FUZZ_SOURCES) -o build/fuzz/fuzz_bank
	build/fuzz/fuzz_bank -max_total_time=$(FUZZ_SECONDS) -max_len=8192 build/fuzz/corpus build/fuzz/seeds

wheel: $(DEV)
	$(BIN)/python -m build --wheel

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[litert,sim]"
	touch $@

$(DEV): $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist demo-data demo-build *.egg-info
