"""How specmemo-jax does on this machine's device, as one Markdown report to paste into an issue.

    python scripts/check_device.py --output report.md
    python scripts/check_device.py --quick
    python scripts/check_device.py --quick --only memory

Run it with the Python that specmemo-jax is installed for (``.venv/bin/python`` after the quick start).
It prints versions, whether speculation gives plain decoding's token ids, planned against compiled
and measured memory, and timings. Exits with 1 if float32 token ids differ, memory exceeds the plan,
or a part could not be run; the report says which, and has the rest. Most of its time goes into
compiling, and less of it the second time.

Every part runs in a process of its own: a device's memory peak cannot be reset, and what crashes one
part leaves the others alone. Those that measure the peak run with XLA_PYTHON_CLIENT_PREALLOCATE=false;
the others take XLA_CLIENT_MEM_FRACTION and the like as they are set.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

JOBS = Path(__file__).parent / "check_device_jobs.py"
MOST_SECONDS = 1800
Arguments = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Result:
    """What one process found: table rows, remarks, and what must not be."""

    rows: list[list[str]]
    notes: list[str] = dataclasses.field(default_factory=list)
    failures: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Section:
    """A chapter of the report: a table with a process for every entry of ``jobs`` (quick, full)."""

    name: str
    title: str
    columns: tuple[str, ...]
    quick: tuple[Arguments, ...]
    full: tuple[Arguments, ...]


def _every(**values: Sequence[Any]) -> tuple[Arguments, ...]:
    """All combinations of arguments."""
    found: list[Arguments] = [{}]
    for name, choices in values.items():
        found = [{**one, name: choice} for one in found for choice in choices]
    return tuple(found)


DTYPES = ("float32", "half")
SECTIONS = (
    Section("device", "Device", ("", ""), ({},), ({},)),
    Section(
        "equality",
        "Token ids against plain decoding",
        ("dtype", "drafter", "batch", "decoding", "answers equal", "tokens a step"),
        _every(dtype=DTYPES),
        _every(dtype=DTYPES),
    ),
    Section(
        "memory",
        "Memory, MiB",
        ("dtype", "drafter", "batch", "plan", "XLA, step", "XLA, prefill", "measured peak", "of the plan"),
        ({"dtype": "auto", "drafter": "ngram", "batch": 4},),
        _every(dtype=DTYPES, drafter=("none", "ngram", "self"), batch=(1, 4)),
    ),
    Section(
        "steps",
        "A step with T nodes, ms (and over T = 1)",
        ("dtype", "batch", "context", "T = 1", "T = 4", "T = 8", "T = 16"),
        ({"dtype": "auto"},),
        _every(dtype=DTYPES),
    ),
    Section(
        "speed",
        "Speed at batch 1, tokens/s",
        ("dtype", "prompt", "prefill", "plain", "ngram", "ngram over plain", "tokens a step"),
        ({"dtype": "auto"},),
        _every(dtype=DTYPES),
    ),
)


def main(argv: list[str] | None = None) -> int:
    names = [section.name for section in SECTIONS]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct", help="name, folder, .gguf or hub id")
    parser.add_argument("--quick", action="store_true", help="fewer cases and shorter answers")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="these parts of the report")
    parser.add_argument("--output", type=Path, help="write the report to this file as well")
    options = parser.parse_args(argv)
    if importlib.util.find_spec("specmemo_jax") is None:
        parser.error(f"specmemo_jax is not installed for {sys.executable}; .venv/bin/python would work")
    command = " ".join(["scripts/check_device.py", *(sys.argv[1:] if argv is None else argv)])
    try:
        report = Report(options.output)
    except OSError as error:
        parser.error(f"cannot write {options.output}: {error.strerror}")
    report.add(f"# specmemo-jax on this device\n\n`{command}`")
    failures: list[str] = []
    for section in SECTIONS:
        if section.name in options.only:
            jobs = section.quick if options.quick else section.full
            text, failed = chapter(section, [run(section.name, job, options) for job in jobs])
            report.add(text)
            failures += failed
    report.add(verdict(failures))
    return int(bool(failures))


class Report:
    """Markdown on standard output, and in a file, as it grows."""

    def __init__(self, file: Path | None):
        self.file = file
        if file is not None:
            file.write_text("", encoding="utf-8")  # here, and not after minutes, where it cannot be written

    def add(self, text: str) -> None:
        print(text + "\n", flush=True)
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as out:
                out.write(text + "\n\n")


def run(name: str, arguments: Arguments, options: argparse.Namespace) -> Result:
    """One part in a process of its own; one that fails is a `Result` that says so."""
    what = ", ".join([name, *(f"{key} {value}" for key, value in arguments.items())])
    print(f"{what} ...", end="", file=sys.stderr, flush=True)
    start = time.perf_counter()
    try:
        return _run(what, name, arguments, options)
    finally:
        print(f" {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


def _run(what: str, name: str, arguments: Arguments, options: argparse.Namespace) -> Result:
    environment = {"TF_CPP_MIN_LOG_LEVEL": "2", "TRANSFORMERS_VERBOSITY": "error", **os.environ}
    if name == "memory":
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    with tempfile.TemporaryDirectory(prefix="check-device-") as folder:
        file = Path(folder) / "result.json"
        arguments = {"model": options.model, "quick": options.quick, **arguments}
        command = [sys.executable, str(JOBS), name, json.dumps(arguments), str(file)]
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=MOST_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return Result([], failures=[f"{what}: no result after {MOST_SECONDS} s"])
        if done.returncode == 0:
            return Result(**json.loads(file.read_text(encoding="utf-8")))
    tail = "\n".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-12:])
    return Result(
        [], [f"{what} said\n\n```\n{tail}\n```"], [f"{what}: ended with exit code {done.returncode}"]
    )


def chapter(section: Section, results: Sequence[Result]) -> tuple[str, list[str]]:
    """A section of the report, and what failed in it."""
    rows = [row for result in results for row in result.rows]
    notes = list(dict.fromkeys(note for result in results for note in result.notes))
    failures = [failure for result in results for failure in result.failures]
    parts = [f"## {section.title}"]
    if rows:
        parts.append(table(section.columns, rows))
    parts += notes
    parts += [f"**Failed**: {failure}" for failure in failures]
    return "\n\n".join(parts), failures


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; cells are made safe for one."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def verdict(failures: Sequence[str]) -> str:
    """The report's last words."""
    if not failures:
        return "## Result\n\nAll checks passed."
    return "\n".join(["## Result\n\nFailed:\n", *(f"- {failure}" for failure in failures)])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
