"""Runs the tests of numbers on the emulated kernels only, with AddressSanitizer and UBSan, once for each seed:

    python tests/native/emulated_suite.py [--seeds 0 1 2] [arguments of pytest]

Sanitizers must be loaded when a process starts, so each run is a process of its own.
"""

import argparse
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS / "helpers"))

from emulator import sanitizer_environment  # noqa: E402

LOSS_TESTS = ("values", "extremes", "long_rows", "autograd", "divergences", "conventions")
NUMERIC_SUITE = [TESTS / "loss" / f"test_{name}.py" for name in LOSS_TESTS]
NUMERIC_SUITE += [TESTS / "activations" / "test_statistics.py"]
NUMERIC_SUITE += [TESTS / "ops" / f"test_{name}.py" for name in ("gather_slices", "gradient_products")]


def run(seed: int, arguments: list[str]) -> int:
    """One run of the suite. Returns pytest's exit code."""
    options = ["--sanitized", "--emulated=only", "--timeout=1200", *arguments]
    chosen = any(Path(argument.partition("::")[0]).exists() for argument in arguments)
    files = [] if chosen else map(str, NUMERIC_SUITE)
    environment = sanitizer_environment() | {"KDDP_EMULATOR_SEED": str(seed)}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *options, *files], env=environment, check=False
    ).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="determine the order of lanes, warps and blocks"
    )
    options, arguments = parser.parse_known_args()
    failed = [seed for seed in options.seeds if run(seed, arguments) != 0]
    print(f"seeds {options.seeds}: " + (f"failed with {failed}" if failed else "all passed"))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
