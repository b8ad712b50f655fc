#!/usr/bin/env bash
# Runs the CPU kernels' tests on a build instrumented with AddressSanitizer and UndefinedBehaviorSanitizer.
# Python itself is not instrumented, so the runtimes are preloaded; leaks are not looked for, since CPython keeps memory.
set -euo pipefail
cd "$(dirname "$0")/.."
root="$PWD"
venv="${VENV:-.venv}"
[[ "$venv" = /* ]] || venv="$root/$venv"  # the tests run from another folder
python="$venv/bin/python"
package="$root/build/sanitized"

"$python" setup.py -q build_py --build-lib "$package" build_ext --sanitize --build-lib "$package" 2>/dev/null
"$python" -c 'import json, sys; sys.exit(json.load(open(sys.argv[1]))["reason"])' "$package/fastattn/_build_report.json"

compiler="${CXX:-c++}"
LD_PRELOAD="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libubsan.so)"
export LD_PRELOAD
export ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export OMP_NUM_THREADS=2

arguments=("$@")
if [ ${#arguments[@]} -eq 0 ]; then
  arguments=(tests/test_attention.py tests/test_attention_backward.py tests/test_attention_short_way.py tests/test_varlen_attention.py
             tests/test_attention_with_kv_cache.py tests/test_layer_norm.py tests/test_int8_matmul.py tests/test_int8_linear.py
             tests/test_int8_interface.py tests/test_linear.py
             -k "not compile and not opcheck and not export and not emulated and not triton")
fi
# pyproject.toml's pythonpath would find the package that is not instrumented first; tests/conftest.py makes sure.
export FASTATTN_TEST_PACKAGE="$package"
exec "$python" -m pytest -p no:cacheprovider --capture=sys -o "pythonpath=$package" "${arguments[@]}"
