"""Random requests for plans: each is refused with a least budget that works, or its proof keeps to it.

    python scripts/check_planner.py                        # 1,000 requests on CPU and, described, CUDA GPUs
    python scripts/check_planner.py --devices cpu --jobs 2 # without the plugin that describes CUDA GPUs
    python scripts/check_planner.py --theory               # nothing compiled
    python scripts/check_planner.py --requests 3000 --drafter llama-3.2-1b-instruct  # some 90 that ask for it

Every refusal is tried again at the least budget it names (a plan must come) and one byte below it (none
may). Every plan is then compiled from shapes alone, its two hungriest programs by theory (all of them with
``--every-program``), and the compiler's peak must be within the budget: 1 request in 20 is for the model in
full, the others for the same model at 2 layers, planned as such. Exit 1 if anything is otherwise.
"""

import argparse
import dataclasses
import os
import random
import statistics
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as TooLong
from multiprocessing import get_context

import jax
from tqdm import tqdm

from specmemo_jax.devices.compiled import compiled_memory
from specmemo_jax.errors import BudgetError, CapacityError, ConfigError
from specmemo_jax.memory.plan import MemoryPlan
from specmemo_jax.planning.prove import compile_target_for, lowerings, programs_for
from specmemo_jax.planning.request import Planning, named_config, planning_for

MODELS = ("smollm2-135m-instruct", "llama-3.2-1b-instruct", "tinyllama-1.1b-chat", "llama-2-7b-chat",
          "llama-2-13b-chat", "llama-2-70b-chat")  # fmt: skip
DEVICES = ("cpu", "titan-rtx", "t4", "a100-80", "h200")
DRAFTERS = ("auto", "ngram", "none", "self:1", "llama-3.2-1b-instruct")
MESH = 8
IN_FULL = 20  # every so many requests one is for all of the model's layers


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a request: ``kind``, what is wrong, and, of a proof, theory's peak over the compiler's."""

    kind: str
    wrong: tuple[str, ...] = ()
    over: float | None = None


def draw(rng: random.Random, devices: tuple[str, ...]) -> dict:
    """One request."""
    model = rng.choice(MODELS)
    drafter = rng.choice(DRAFTERS)
    if drafter.startswith("llama"):
        same = named_config(drafter).config.vocab_size == named_config(model).config.vocab_size
        drafter = drafter if same else "auto"
    context = rng.choice((None, 256, 640, 1024, 2048))
    new = rng.choice((1, 32, 128))
    return {
        "model": model,
        "device": rng.choice(devices),
        "drafter": drafter,
        "batch": rng.choice((1, 2, 4, 16)),
        "context": context,
        "prompt_tokens": rng.randint(1, (context or 2048) - new),
        "new_tokens": new,
        "tree_nodes": rng.choice((None, None, 4, 16)) if drafter not in ("none", "auto") else None,
        "shards": rng.choice((1, 1, 1, MESH)),
    }


def asked(number: int, options: argparse.Namespace) -> dict:
    """Request ``number``."""
    return draw(random.Random(f"{options.seed}/{number}"), options.devices)


def two_layers(planning: Planning) -> Planning:
    """The same request for a model of 2 layers."""
    config = dataclasses.replace(planning.request.config, num_layers=2)
    return dataclasses.replace(planning, task=dataclasses.replace(planning.request, config=config))


def attempt(planning: Planning, budget: int) -> MemoryPlan | BudgetError:
    """The plan under a budget, or the refusal."""
    try:
        return dataclasses.replace(planning, budget=budget).plan()
    except BudgetError as refusal:
        return refusal


def answer(number: int, options: argparse.Namespace) -> Outcome:
    """Draw request ``number``, plan it, and prove the plan or try the refusal."""
    rng = random.Random(f"{options.seed}/{number}")
    request = draw(rng, options.devices)
    try:
        planning = planning_for(**request)
        planning = planning if number % IN_FULL == 0 else two_layers(planning)
        peaks = [plan.peak_bytes for plan in planning.frontier()]
    except (CapacityError, ConfigError) as error:
        return Outcome("cannot be", () if str(error) else (f"{request}: an empty refusal",))
    budget = max(1, int(rng.choice((0.3, 0.9, 1.0, 1.05, 2.0)) * rng.choice(peaks)))
    found = attempt(planning, budget)
    if isinstance(found, BudgetError):
        return Outcome("refused", tuple(f"{request}: {w}" for w in refusal_errors(planning, budget, found)))
    wrong = [] if found.peak_bytes <= budget else [f"peak {found.peak_bytes} over the budget {budget}"]
    over, kind = None, "planned"
    if not options.theory:
        compiled = compiled_peak(found, planning, options.every_program)
        over, kind = found.peak_bytes / compiled - 1, "proved" + (" in full" if number % IN_FULL == 0 else "")
        if compiled > budget:
            wrong.append(f"compiled {compiled} over the budget {budget}")
    return Outcome(kind, tuple(f"request {number}, {request}: {w}" for w in wrong), over)


def refusal_errors(planning: Planning, budget: int, refusal: BudgetError) -> list[str]:
    """What is wrong with a refusal of ``budget``."""
    least, wrong = refusal.least_budget, []
    memory = planning.request.device.memory_bytes
    if least <= budget <= memory:  # a budget beyond the device is refused for that
        wrong.append(f"refused {budget} and names {least}")
    if least <= memory and not isinstance(attempt(planning, least), MemoryPlan):
        wrong.append(f"no plan at the least budget {least}")
    if least > 1 and isinstance(attempt(planning, least - 1), MemoryPlan):
        wrong.append(f"a plan one byte below the least budget {least}")
    return wrong


def compiled_peak(plan: MemoryPlan, planning: Planning, every_program: bool) -> int:
    """Weights, the platform's reserve, persistent buffers and the most that a compiled program needs."""
    programs = programs_for(
        plan, compile_target_for(planning.request.device, planning.request.dtype, plan.shapes.shards)
    )
    by_size = sorted(plan.footprint.programs, key=lambda p: p.bytes, reverse=True)
    named = [f"{p.name}, sampled" for p in by_size if p.name != "growth"]
    extras = [
        compiled_memory(programs.compile(lower())).extra
        for name, lower in lowerings(programs)
        if every_program or name in named[:2]
    ]
    return plan.reserve_bytes + sum(buffer.bytes for buffer in plan.buffers) + max(extras)


def main() -> int:
    """Ask, print; 1 if anything was wrong."""
    options = _options()
    outcomes, failures, over = Counter(), [], []
    numbers = [n for n in range(options.requests) if options.drafter in (None, asked(n, options)["drafter"])]
    deadline = time.monotonic() + options.limit_seconds
    began = _begin, (options.devices,)
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), *began) as pool:
        futures = [pool.submit(answer, number, options) for number in numbers]
        for future in tqdm(futures, leave=False, mininterval=0.5 if sys.stderr.isatty() else 60):
            try:
                outcome = future.result(max(0.0, deadline - time.monotonic()))
            except TooLong:
                pool.shutdown(wait=False, cancel_futures=True)
                break
            outcomes[outcome.kind] += 1
            failures += outcome.wrong
            for failure in outcome.wrong:
                tqdm.write(failure)
            if outcome.over is not None:
                over.append(outcome.over)
    counts = ", ".join(f"{count} {name}" for name, count in sorted(outcomes.items()))
    print(f"{sum(outcomes.values())} of {len(numbers)} requests: {counts}; {len(failures)} wrong")
    if over:
        middle = f"median {statistics.median(over):.2%}, most {max(over):.1%}"
        print(f"{len(over)} proofs: the plan's peak over the compiler's: least {min(over):.2%}, {middle}")
    return int(bool(failures) or sum(outcomes.values()) < len(numbers))


def _begin(devices: tuple[str, ...]) -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    jax.config.update("jax_platforms", "cpu")
    if "cpu" in devices:
        jax.config.update("jax_num_cpu_devices", MESH)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--devices", type=lambda text: tuple(text.split(",")), default=DEVICES)
    parser.add_argument("--drafter", choices=DRAFTERS, help="only the requests that ask for it")
    parser.add_argument("--theory", action="store_true", help="compile nothing")
    parser.add_argument("--every-program", action="store_true", help="of a plan, not the two hungriest")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit-seconds", type=float, default=10.0**7)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
