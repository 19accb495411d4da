#!/usr/bin/env bash
# Builds the native module with AddressSanitizer and UBSan (in build/asan, reused) and runs the laws
# of the ops on it. PYTHON chooses the interpreter; arguments replace the choice of tests.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}
[[ $python != */* || $python == /* ]] || python=$PWD/$python  # we import from elsewhere below
bin=$(dirname "$(command -v "$python")")
build=build/asan
PATH="$bin:$PATH"

cmake -S . -B "$build" -G Ninja -DELASTIC_SANITIZE=ON -DCMAKE_STRIP= \
  -DPython_EXECUTABLE="$(command -v "$python")" \
  -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" >"$build.log" 2>&1 ||
  { cat "$build.log"; exit 1; }
ninja -C "$build" >"$build.log" 2>&1 || { cat "$build.log"; exit 1; }

# The package as links, with the sanitized module in place of the usual one.
package=$build/package/elastic_infer
rm -rf "$package" && mkdir -p "$package"
for entry in elastic_infer/*; do
  case $entry in *_C*.so | *__pycache__) ;; *) ln -s "$PWD/$entry" "$package/" ;; esac
done
ln -s "$PWD/$build"/_C*.so "$package/"

tests=(tests/ops/test_ops.py tests/ops/test_mamba_ops.py tests/ops/test_attention_ops.py tests/ops/test_binding.py
  tests/ops/test_op_safety.py
  -k "not avx2 and not meanwhile")
[[ $# -eq 0 ]] || tests=("$@")
# No leak check: the interpreter itself never frees everything.
LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libstdc++.so)" \
ASAN_OPTIONS=detect_leaks=0:abort_on_error=0 UBSAN_OPTIONS=print_stacktrace=1 \
OMP_NUM_THREADS=1 PYTHONPATH="$PWD/$build/package" \
  "$python" -c '
import sys
sys.path.remove("")  # the usual module is here
import elastic_infer._C as c
assert "build/asan" in c.__file__, f"not the sanitized module: {c.__file__}"
import pytest
sys.exit(pytest.main(sys.argv[1:]))' -q -p no:cacheprovider "${tests[@]}"
