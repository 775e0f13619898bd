"""A batch job killed with kill -9 again and again, and resumed: every row there once, whole, the same text.

    python scripts/check_batch_kills.py                    # 100 kills, jobs of 200 rows, the default model
    python scripts/check_batch_kills.py --model FOLDER --kills 10 --rows 40

An unbroken run is made first. Then jobs are run and killed, half of the times after a random number of
new rows, half at a random time of the run, its start included; each job is killed ``--kills-a-job`` times,
then resumed to its end, and its rows are held against the unbroken run's. Exit 1 if any differ, or if a row
that a kill found on disk, early or in its place, was answered again.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm


def request(number: int, new_tokens: int) -> dict:
    """One line: chat and plain, greedy and sampled, short and long."""
    asked = "Name a color. " * (1 + number % 7)
    own = {"max_tokens": 1 + number * 7 % new_tokens, "temperature": 0.8 * (number % 2)}
    if number % 5 == 4:
        return {"prompt": asked, **own}
    body = {"messages": [{"role": "user", "content": asked}], **own}
    return {"custom_id": f"row-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}


def rows(path: Path) -> list[dict]:
    """Rows without the times at which they were made."""
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in found:
        row["response"]["body"].pop("created", None)
    return found


def lines(path: Path) -> int:
    """Whole lines so far."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def answered(out: Path) -> dict[str, bytes]:
    """Every whole row that is on disk, in its place or early, byte for byte, by its id."""
    found = {}
    for file in (Path(f"{out}.early"), out):
        whole = file.read_bytes().rpartition(b"\n")[0] if file.exists() else b""
        found |= {json.loads(raw)["id"]: raw for raw in whole.splitlines()}
    return found


def kill_once(command: list[str], out: Path, rng: random.Random, most_seconds: float, wanted: int) -> str:
    """Run and kill; where it ended before, that is said."""
    after_rows = rng.random() < 0.5
    enough, until = lines(out) + rng.randint(1, wanted), time.monotonic() + rng.uniform(0, most_seconds)
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        if (lines(out) >= enough) if after_rows else (time.monotonic() >= until):
            break
        time.sleep(0.001)
    process.kill()
    ended = process.wait() == 0
    return "ended" if ended else "killed after rows" if after_rows else "killed at a time"


def main() -> int:
    """Run, kill, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--kills-a-job", type=int, default=10)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, counts, wrong = random.Random(options.seed), dict[str, int](), 0
    kept, early, again = 0, 0, 0
    with tempfile.TemporaryDirectory() as folder, tqdm(total=options.kills, disable=None) as bar:
        source, whole = Path(folder, "in.jsonl"), Path(folder, "whole.jsonl")
        asked = [request(number, options.new_tokens) for number in range(options.rows)]
        source.write_text("".join(json.dumps(line) + "\n" for line in asked), encoding="utf-8")

        def command(out: Path) -> list[str]:
            how = ("--model", options.model, "--max-batch", "4", "--max-context", "256", "--resume")
            return [sys.executable, "-m", "specmemo_jax", "batch", str(source), str(out), *how]

        began = time.monotonic()
        subprocess.run(command(whole), check=True, stderr=subprocess.DEVNULL)
        took, expected, killed = time.monotonic() - began, rows(whole), 0
        assert len(expected) == options.rows
        job = 0
        while killed < options.kills:
            out, job = Path(folder, f"out-{job}.jsonl"), job + 1
            before: dict[str, bytes] = {}
            for _ in range(options.kills_a_job):
                what = kill_once(
                    command(out), out, rng, took / 2, max(1, options.rows // options.kills_a_job)
                )
                counts[what] = counts.get(what, 0) + 1
                if what == "ended":
                    break
                killed += 1
                now = answered(out)
                again += sum(now.get(name) != row for name, row in before.items())
                kept, early, before = kept + len(now), early + len(now) - lines(out), now
                bar.update()
            subprocess.run(command(out), check=True, stderr=subprocess.DEVNULL)
            wrong += rows(out) != expected
            now = answered(out)
            again += sum(now.get(name) != row for name, row in before.items())
    said = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
    print(f"{job} jobs of {options.rows} rows: {said}; {wrong} jobs with other rows than the unbroken run")
    print(f"kills found {kept} rows on disk, {early} of them early; {again} were answered again or lost")
    return int(wrong > 0 or again > 0)


if __name__ == "__main__":
    sys.exit(main())
