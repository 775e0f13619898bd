"""Set up .venv if needed and run the tests: python3 scripts/test.py [pytest arguments]."""

import argparse
import os
import subprocess
import sys

from _bootstrap import ROOT, add, add_wheels, enter

LINTERS = (["ruff", "check"], ["ruff", "format", "--check"], ["pyright", "--pythonpath", sys.executable])


# What a thorough run asks again, with programs as a user runs them, or what was skipped before.
OPTIMISED = (
    "tests/engine",
    "tests/decode",
    "tests/serve/test_serve.py",
    "tests/test_reference.py",
    "tests/planning/test_view.py",
)
DESCRIBED = "tests/devices/test_described.py"  # wants JAX's CUDA plugin
AGAINST_TORCH = "tests/llama/test_golden.py"


def main() -> int:
    usage = "%(prog)s [--lint] [--thorough] [pytest arguments]"
    parser = argparse.ArgumentParser(description=__doc__, usage=usage)
    parser.add_argument("--lint", action="store_true", help="lint, formatting and types before the tests")
    parser.add_argument("--lint-only", action="store_true", help="lint, formatting and types alone")
    parser.add_argument(
        "--thorough",
        action="store_true",
        help="optimised programs, all reference answers, and the tests that want more packages (some 1 GB)",
    )
    options, pytest_arguments = parser.parse_known_args()
    enter(extras=("dev",))
    add(("ray", "eval"))  # heavy, and from an index that may lack them: their tests are skipped then
    failed = 0
    if options.lint or options.lint_only:
        failed = sum(_run(*linter) for linter in LINTERS)
    if not options.lint_only:
        if options.thorough:
            failed += _run_thorough(pytest_arguments)
        else:
            failed += _run("pytest", *(pytest_arguments or _in_parallel()))
    return int(failed > 0)


def _run_thorough(pytest_arguments: list[str]) -> int:
    """Runs that failed. Torch comes last, so that all other tests run without it."""
    from importlib.metadata import version

    os.environ["SPECMEMO_TEST_THOROUGH"] = "1"
    jax, chosen = version("jax"), [str(name) for name in OPTIMISED]
    add(("plot",))
    if add_wheels("--no-deps", f"jax-cuda12-pjrt=={jax}", f"jax-cuda12-plugin=={jax}"):
        chosen.append(DESCRIBED)
    if pytest_arguments:
        return _run("pytest", *pytest_arguments)
    failed = _run("pytest", *_in_parallel(), *chosen)
    if add_wheels("torch==2.13.0"):
        failed += _run("pytest", AGAINST_TORCH)
    return failed


def _in_parallel() -> list[str]:
    """The whole suite, whose time is XLA's compiling: a process a core, and a file's tests in one of them."""
    return ["-n", str(min(4, os.cpu_count() or 1)), "--dist", "loadfile"]


def _run(module: str, *arguments: str) -> bool:
    """Whether it failed; what it prints goes through."""
    print(f"== {' '.join([module, *arguments])}", flush=True)
    return subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, check=False).returncode != 0


if __name__ == "__main__":
    sys.exit(main())
