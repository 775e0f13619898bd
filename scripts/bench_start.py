"""Seconds from nothing to an answer, each in a fresh process: with empty caches (cold) and full ones (warm).

    python scripts/bench_start.py                              # the default model: `generate`, and LLM(...)
    python scripts/bench_start.py --shape deep                 # 32 layers, 1 billion random weights
    python scripts/bench_start.py --against ../other-checkout  # both, in turn

For each checkout one cold start, then ``--rounds`` warm ones, of which the medians are shown, with the least
and the most. Beside the wall clock's seconds stand the processor's (user and system), which tell whether
other work on the machine took part. Weights are fetched before anything is measured, and each checkout keeps
its compiled programs in a folder of its own, which begins empty.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "Why is the sky blue?"
# A process that says when it had a model, a first answer and a second one, in seconds since it began.
LIBRARY = """
import json, os, sys, time
start = float(sys.argv[1])
options = json.loads(sys.argv[2])
import numpy as np
from specmemo_jax import LLM, LlamaConfig, SamplingParams
model, params = options["model"], None
if options["shape"] is not None:
    model = LlamaConfig(**options["shape"])
    noise = 0.02 * np.random.default_rng(0).standard_normal(2**20, np.float32)
    params = {
        name: np.ones(shape, np.float32) if name.endswith("norm.weight") else np.resize(noise, shape)
        for name, shape in model.tensor_shapes().items()
    }
told = {"imports and noise": time.time() - start}
llm = LLM(model, params, max_context=512)
told["LLM(...)"] = time.time() - start
prompt = options["prompt"] if params is None else [list(range(1, 25))]
for name in ("first answer", "second answer"):
    llm.generate(prompt, SamplingParams(temperature=0, max_tokens=options["tokens"], ignore_eos=True))
    told[name] = time.time() - start
print(json.dumps(told))
"""
DEEP = {
    "vocab_size": 32000, "hidden_size": 1600, "ffn_size": 4352, "num_layers": 32, "num_heads": 25,
    "num_kv_heads": 5, "head_dim": 64, "max_context": 2048,
}  # fmt: skip


def main() -> int:
    """Measure and print; 1 where a start fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--shape", choices=("model", "deep"), default="model")
    parser.add_argument("--against", type=Path, help="another checkout, measured in turn with this one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=24)
    options = parser.parse_args()
    checkouts = [ROOT] if options.against is None else [options.against.resolve(), ROOT]
    deep = options.shape == "deep"
    told = {"model": options.model, "shape": DEEP if deep else None, "prompt": PROMPT}
    library = [sys.executable, "-c", LIBRARY, "NOW", json.dumps({**told, "tokens": options.tokens})]
    generate = [
        sys.executable, "-m", "specmemo_jax", "generate", PROMPT, "--model", options.model,
        "--max-tokens", str(options.tokens), "--max-context", "512", "--ignore-eos",
    ]  # fmt: skip
    programs = {"LLM": library} if deep else {"specmemo generate": generate, "LLM": library}
    with tempfile.TemporaryDirectory() as folder:
        for name, command in programs.items():
            caches = {checkout: Path(folder) / f"{name}-{n}" for n, checkout in enumerate(checkouts)}
            if not deep:
                for cache in caches.values():
                    _give_weights(options.model, cache)
            cold = {checkout: _started(command, checkout, caches[checkout]) for checkout in checkouts}
            warm = {checkout: [] for checkout in checkouts}
            for _ in range(options.rounds):
                for checkout in checkouts:
                    warm[checkout].append(_started(command, checkout, caches[checkout]))
            for checkout in checkouts:
                _show(f"{name}, {checkout}", cold[checkout], warm[checkout])
    return 0


def _give_weights(model: str, cache: Path) -> None:
    """Into an otherwise empty cache folder, from the user's own, where they are fetched once."""
    from specmemo_jax.checkpoints import resolve

    file = Path(resolve(model).path)
    if file.is_file() and file.parent.parent.name == "models":
        (cache / "models" / model).mkdir(parents=True)
        shutil.copy2(file, cache / "models" / model)


def _started(command: list[str], checkout: Path, cache: Path) -> dict[str, float]:
    """Seconds by what had been reached. Raises SystemExit with the process's own words where it fails."""
    environment = {**os.environ, "SPECMEMO_CACHE": str(cache), "PYTHONPATH": str(checkout)}
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    command = [str(begin) if part == "NOW" else part for part in command]
    ended = subprocess.run(
        command, env=environment, cwd=cache.parent, capture_output=True, text=True, check=False
    )
    wall, after = time.time() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    if ended.returncode:
        sys.exit(f"error: {command[:4]} of {checkout} failed:\n{ended.stderr}")
    reached = json.loads(ended.stdout.splitlines()[-1]) if "LLM(...)" in ended.stdout else {}
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {**reached, "process's end": wall, "processor": processor}


def _show(title: str, cold: dict[str, float], warm: list[dict[str, float]]) -> None:
    print(f"{title}\n{'seconds':<20}{'cold':>8}{'warm':>8}   least to most")
    for name, seconds in cold.items():
        found = [one[name] for one in warm]
        spread = f"{min(found):.1f} to {max(found):.1f}"
        print(f"{name:<20}{seconds:>8.1f}{statistics.median(found):>8.1f}   {spread}")
    print(flush=True)


if __name__ == "__main__":
    sys.exit(main())
