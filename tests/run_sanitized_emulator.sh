#!/usr/bin/env bash
# Runs the CUDA kernels on the emulator under a sanitizer: "address" (AddressSanitizer and UndefinedBehaviorSanitizer:
# accesses outside of tensors and shared memory, misaligned vectors) or "thread" (ThreadSanitizer: missing barriers,
# whatever the schedule). Python is not instrumented, so the sanitizer's runtime is preloaded. Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
sanitizer="$1"
shift
python="${VENV:-.venv}/bin/python"
compiler="${CXX:-c++}"
tests=(tests/test_ptx.py tests/test_ptx_cluster.py tests/test_emulator.py tests/test_emulator_bugs.py tests/test_int8_matmul_kernels.py
       tests/test_kernels_sanitized.py)
# ThreadSanitizer needs memory mapped where it expects it, which the kernel's address randomisation may prevent.
fixed_addresses=()
if setarch "$(uname -m)" -R true 2>/dev/null; then fixed_addresses=(setarch "$(uname -m)" -R); fi

export FASTATTN_TEST_SANITIZER="$sanitizer"
case "$sanitizer" in
  address)
    preload="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libubsan.so)"
    export ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
    # Kernels that are wrong on purpose may leave their memory, which would end the process here.
    selection="not past_the_end and not seeded_bug"
    ;;
  thread)
    preload="$("$compiler" -print-file-name=libtsan.so)"
    export TSAN_OPTIONS=ignore_noninstrumented_modules=1
    # Only kernels that are right as they stand; tests/test_emulator_races.py has those with races.
    tests=(tests/test_ptx.py tests/test_ptx_cluster.py tests/test_emulator_bugs.py tests/test_int8_matmul_kernels.py
       tests/test_kernels_sanitized.py)
    selection="not seeded_bug"
    "${fixed_addresses[@]}" "$python" -m pytest tests/test_emulator_races.py
    ;;
  *)
    echo "usage: $0 address|thread [pytest arguments]" >&2
    exit 2
    ;;
esac
# What a sanitizer reports goes to the standard error stream itself, where pytest would swallow it for tests that pass.
exec "${fixed_addresses[@]}" env LD_PRELOAD="$preload" "$python" -m pytest -p no:cacheprovider --capture=sys "${tests[@]}" -k "$selection" "$@"
