"""Fuzzing guided by coverage: python tests/robustness/fuzzing/with_atheris.py TARGET|all [--seconds N].

Needs `pip install atheris`. Prints how many inputs each target was given and whether one did what it must not; that
input is then kept in the folder named.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "helpers")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", help="a name from targets.py, or all")
    parser.add_argument("--seconds", type=int, default=120, help="for each target")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)  # the folder of this process's target
    arguments = parser.parse_args()
    if find_spec("atheris") is None:
        print(
            "atheris is not installed: pip install atheris (Linux and macOS). tests/robustness/fuzzing runs without it."
        )
        return 0
    if arguments.inside:
        fuzz(arguments.target, arguments.seconds, arguments.inside)
    from fuzzing.targets import TARGETS

    if arguments.target not in ("all", *TARGETS):
        parser.error(f"target: expected all or one of {', '.join(TARGETS)}, got {arguments.target}")
    names = list(TARGETS) if arguments.target == "all" else [arguments.target]
    return max([report(name, arguments.seconds) for name in names])


def report(name: str, seconds: int) -> int:
    """Fuzz one target in a process of its own, which libFuzzer ends; 0 where nothing was found."""
    folder = Path(tempfile.mkdtemp(prefix=f"atheris-{name}-"))
    command = [sys.executable, __file__, name, "--seconds", str(seconds), "--inside", str(folder)]
    output = subprocess.run(command, capture_output=True, text=True, check=False)
    log = output.stdout + output.stderr
    tried = re.search(r"number_of_executed_units:\s*(\d+)", log)
    found = sorted(path for path in folder.glob("found-*"))
    (folder / "log").write_text(log)
    state = "nothing found" if output.returncode == 0 else f"FOUND, exit code {output.returncode}, see {folder}"
    print(f"{name:<16} {tried[1] if tried else '?':>9} inputs in {seconds} s: {state} {[path.name for path in found]}")
    sys.stdout.flush()
    return int(output.returncode != 0)


def fuzz(name: str, seconds: int, folder: Path) -> None:
    """Never returns: libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["kddp_ext", "gzip", "json"], enable_loader_override=False):
        from fuzzing.targets import TARGETS, check

    target = TARGETS[name]
    corpus, scratch = folder / "corpus", folder / "scratch"
    corpus.mkdir()
    for number, seed in enumerate(target.seeds()):
        (corpus / str(number)).write_bytes(seed)
        check(target, seed, scratch)  # once before, so that what is imported late is not counted as allocated
    options = [
        f"-max_total_time={seconds}",
        f"-artifact_prefix={folder}/found-",
        "-print_final_stats=1",
        "-timeout=20",
        "-rss_limit_mb=4096",
        f"-max_len={4 * max(map(len, target.seeds())) + 1000}",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], lambda content: check(target, content, scratch) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
