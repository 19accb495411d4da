# llama.cpp as speed peer on the random 620M model. Everything made here lies under build/.
# bench-peer-build takes about ten minutes of one core; needs cmake, ninja and a C++ compiler.

PEER_TYPES ?= bf16 q8_0
PEER_THREADS ?= 1 2
PEER_JOBS ?= 2
PEER_LIBRARY := build/peer/llama-build/bin/llama-bench
PEER_MODEL := build/models/620m
PEER_TINY := build/models/tiny

.PHONY: bench-models bench-peer bench-peer-alone bench-peer-build bench-peer-check

build/models/%/config.json: | build/env/python
	$(PY) -m bench.common.models --model $* --out build/models/$*

$(PEER_LIBRARY): | build/env/python
	$(PY) -m bench.llama.build build --jobs $(PEER_JOBS)

bench-models: $(PEER_MODEL)/config.json $(PEER_TINY)/config.json

bench-peer-build: $(PEER_LIBRARY)

# llama.cpp's fp32 logits on the tiny model against those of transformers.
bench-peer-check: bench-peer-build $(PEER_TINY)/config.json
	$(PY) -m bench.llama.peer check $(PEER_TINY)

# Tokens per second of llama.cpp alone, as JSON on stdout.
bench-peer-alone: bench-peer-build $(PEER_MODEL)/config.json
	$(PY) -m bench.llama.peer measure $(PEER_MODEL) --types $(PEER_TYPES) \
	  --threads $(PEER_THREADS)

# This library beside llama.cpp in one run, in bf16: a table, and JSON in bench/results.
bench-peer: bench-peer-build $(PEER_MODEL)/config.json
	$(PY) -m bench.cpu.beside_llama --out bench/results/compare-620m.json
