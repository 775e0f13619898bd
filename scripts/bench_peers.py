"""Batched plain decoding beside transformers + torch, the same weights and prompts, in one interleaved run.

    python scripts/bench_peers.py                                 # batch 1, 8, 16, 32 in float32 and bfloat16
    python scripts/bench_peers.py --dtypes float32 --batches 8

Tokens a second of one call that reads the prompts and answers all rows greedily, ends of text ignored. Each
engine has a process of its own, since their threads hinder each other even when only one works. ``control``
is a second engine of ours. Ratios are over transformers in the same dtype, medians of the rounds', of which
the least and the most stand beside them. A peer that is not installed is named and left out.
"""

import argparse
import importlib.util
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import jax
import numpy as np
from bench_step import processor

from specmemo_jax import LLM, SamplingParams
from specmemo_jax.checkpoints import resolve

Run = Callable[[], float]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 16, 32])
    parser.add_argument("--prompt-tokens", type=int, default=57)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    peer = importlib.util.find_spec("torch") is not None
    print(f"{options.model} on {processor(jax.devices()[0])}, jax {jax.__version__}")
    if not peer:
        print("torch is not installed, so transformers is left out; pip install torch would do")
    print(f"{'dtype':>9}{'batch':>6}{'here':>9}{'control':>9}{'transf.':>9}   here / transf.       control")
    for dtype in options.dtypes:
        for batch in options.batches:
            _measure(options, dtype, batch, peer)


def _measure(options: argparse.Namespace, dtype: str, batch: int, peer: bool) -> None:
    prompts = np.random.default_rng(0).integers(1000, 40000, (batch, options.prompt_tokens)).tolist()
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for name in ("here", "control", *(("transformers",) if peer else ())):
        ours, theirs = context.Pipe()
        work = _transformers if name == "transformers" else _here
        arguments = theirs, options.model, dtype, prompts, options.new_tokens
        processes.append(context.Process(target=work, args=arguments, daemon=True))
        processes[-1].start()
        ours.recv()  # it is ready, and has run once
        pipes[name] = ours
    rounds: dict[str, list[float]] = {name: [] for name in pipes}
    for _ in range(options.rounds):
        for name, pipe in pipes.items():
            pipe.send(True)
            rounds[name].append(batch * options.new_tokens / pipe.recv())
    for pipe in pipes.values():
        pipe.send(False)
    for process in processes:
        process.join()
    speed = {name: f"{statistics.median(found):>9.1f}" for name, found in rounds.items()}
    over = _ratio(rounds["here"], rounds["transformers"]) if peer else "-"
    control = _ratio(rounds["control"], rounds["here"])
    print(
        f"{dtype:>9}{batch:>6}{speed['here']}{speed['control']}{speed.get('transformers', '-'):>9}"
        f"   {over:<19}   {control}",
        flush=True,
    )


def _ratio(speeds: list[float], over: list[float]) -> str:
    each = [one / other for one, other in zip(speeds, over, strict=True)]
    return f"{statistics.median(each):.2f} ({min(each):.2f}-{max(each):.2f})"


def _serve(pipe: Connection, run: Run) -> None:
    run()
    pipe.send(True)
    while pipe.recv():
        pipe.send(run())


def _here(pipe: Connection, model: str, dtype: str, prompts: list[list[int]], new_tokens: int) -> None:
    context = len(prompts[0]) + new_tokens
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    fields: dict[str, Any] = {"drafter": None, "dtype": dtype, "max_batch": len(prompts)}
    with LLM(model, max_context=context, **fields) as llm:

        def run() -> float:
            began = time.perf_counter()
            llm.generate(prompts, params)
            return time.perf_counter() - began

        _serve(pipe, run)


def _transformers(
    pipe: Connection, model: str, dtype: str, prompts: list[list[int]], new_tokens: int
) -> None:
    from _torch_model import timed_answers, torch_model

    peer = torch_model(resolve(model).path, dtype)
    _serve(pipe, lambda: timed_answers(peer, prompts, new_tokens))


if __name__ == "__main__":
    sys.exit(main())
