"""Runs the numeric tests on the native CPU module compiled with AddressSanitizer and UBSan:

    python tests/native/sanitized_suite.py [--instruction-sets baseline avx2 avx512 avx512_bf16] [arguments of pytest]

The default is the widest instruction set of this processor. New memory is filled with 0xff, which is NaN in every
element type, so that reading uninitialised memory changes the results.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS / "helpers"))

from emulated_suite import NUMERIC_SUITE  # noqa: E402
from emulator import SANITIZE, sanitizer_environment  # noqa: E402
from native_build import INSTRUCTION_SETS, build_package, run_tests, supported  # noqa: E402

# The bindings and whole prunes.
MORE = [TESTS / "loss" / "test_arguments.py", TESTS / "pruning" / "test_compaction.py"]


def run(instruction_set: str, arguments: list[str]) -> int:
    """Runs the suite once and returns pytest's exit code."""
    environment = sanitizer_environment()
    environment["ASAN_OPTIONS"] += ":max_malloc_fill_size=1073741824:malloc_fill_byte=255"
    environment["UBSAN_OPTIONS"] = "print_stacktrace=1"
    with tempfile.TemporaryDirectory() as folder:
        # -O0, because optimised compilation with both sanitizers takes longer than the tests.
        site = build_package(Path(folder), instruction_set, [*SANITIZE, "-g1", "-O0"])
        options = ["--emulated=none", "--sanitized", "--timeout=1200", *arguments]
        return run_tests(site, [*NUMERIC_SUITE, *MORE], options, environment)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instruction-sets", nargs="+", choices=INSTRUCTION_SETS)
    options, arguments = parser.parse_known_args()
    chosen = options.instruction_sets or supported()[-1:]
    failed = [name for name in chosen if run(name, arguments) != 0]
    print(f"sanitized, {', '.join(chosen)}: " + (f"failed with {', '.join(failed)}" if failed else "all passed"))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
