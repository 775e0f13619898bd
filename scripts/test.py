"""Set up .venv if needed and run the tests: python3 scripts/test.py [--lint] [pytest arguments]"""

import argparse
import os
import subprocess
import sys

from _bootstrap import ROOT, add, enter

LINTERS = (["ruff", "check"], ["ruff", "format", "--check"], ["pyright", "--pythonpath", sys.executable])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, usage="%(prog)s [--lint] [pytest arguments]")
    parser.add_argument("--lint", action="store_true", help="lint, formatting and types before the tests")
    parser.add_argument("--lint-only", action="store_true", help="lint, formatting and types alone")
    options, pytest_arguments = parser.parse_known_args()
    enter(extras=("dev",))
    add(("ray", "eval"))  # heavy, and from an index that may lack them: their tests are skipped then
    failed = 0
    if options.lint or options.lint_only:
        failed = sum(_run(*linter) for linter in LINTERS)
    if not options.lint_only:
        failed += _run("pytest", *(pytest_arguments or _in_parallel()))
    return int(failed > 0)


def _in_parallel() -> list[str]:
    """The whole suite, whose time is XLA's compiling: a process a core, and a file's tests in one of them."""
    return ["-n", str(min(4, os.cpu_count() or 1)), "--dist", "loadfile"]


def _run(module: str, *arguments: str) -> bool:
    """Whether it failed; what it prints goes through."""
    print(f"== {' '.join([module, *arguments])}", flush=True)
    return subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, check=False).returncode != 0


if __name__ == "__main__":
    sys.exit(main())
