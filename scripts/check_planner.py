"""Random requests for plans: each is refused with a least budget that works, or keeps to its budget.

    python scripts/check_planner.py                              # 1,000 requests, theory alone
    python scripts/check_planner.py --proofs 20 --limit-seconds 600   # some plans compiled at 2 layers

Every refusal is tried again at the least budget it names (a plan must come) and one byte below it (none
may). A proof compiles every program of the plan, at 2 layers, for this machine's CPU; the plan of 2 layers
must have fitted the budget. Exit 1 if anything is otherwise.
"""

import argparse
import dataclasses
import random
import sys
import time
from collections import Counter

from tqdm import tqdm

from specmemo_jax.errors import BudgetError, CapacityError
from specmemo_jax.memory.plan import MemoryPlan
from specmemo_jax.planning import Planning, named_config, planning_for
from specmemo_jax.proving import place_for, prove

MODELS = ("smollm2-135m-instruct", "llama-3.2-1b-instruct", "tinyllama-1.1b-chat", "llama-2-7b-chat",
          "llama-2-13b-chat", "llama-2-70b-chat")  # fmt: skip
DEVICES = ("cpu", "titan-rtx", "t4", "a100-80", "h200", "mi250-gcd")
DRAFTERS = ("auto", "ngram", "none", "self:1", "llama-3.2-1b-instruct")


def draw(rng: random.Random, small: bool) -> dict:
    """One request; ``small``: for this CPU and quickly compiled."""
    model = rng.choice(MODELS[:3] if small else MODELS)
    drafter = rng.choice(DRAFTERS)
    if "/" not in drafter and drafter.startswith("llama"):
        same = named_config(drafter).config.vocab_size == named_config(model).config.vocab_size
        drafter = drafter if same else "auto"
    context = rng.choice((None, 256, 640, 1024, 2048))
    room = context or 2048
    new = rng.choice((1, 32, 128))
    return {
        "model": model,
        "device": "cpu" if small else rng.choice(DEVICES),
        "drafter": drafter,
        "batch": rng.choice((1, 2, 4, 16)),
        "context": context,
        "prompt_tokens": rng.randint(1, room - new),
        "new_tokens": new,
        "tree_nodes": rng.choice((None, None, 4, 16)) if drafter not in ("none", "auto") else None,
    }


def two_layers(planning: Planning) -> Planning:
    """The same request for a model of 2 layers."""
    config = dataclasses.replace(planning.task.config, num_layers=2)
    return dataclasses.replace(planning, task=dataclasses.replace(planning.task, config=config))


def attempt(planning: Planning, budget: int | None) -> MemoryPlan | BudgetError:
    """The plan under a budget, or the refusal."""
    try:
        return dataclasses.replace(planning, budget=budget).plan()
    except BudgetError as refusal:
        return refusal


def check(planning: Planning, budget: int) -> tuple[str, list[str]]:
    """What came of a request, and what is wrong with it."""
    found, wrong = attempt(planning, budget), []
    if isinstance(found, MemoryPlan):
        if found.peak_bytes > budget:
            wrong.append(f"peak {found.peak_bytes} over the budget {budget}")
        return "planned", wrong
    least = found.least_budget
    if least <= budget <= planning.task.device.memory_bytes:
        wrong.append(f"refused {budget} and names {least}")
    if least <= planning.task.device.memory_bytes and not isinstance(attempt(planning, least), MemoryPlan):
        wrong.append(f"no plan at the least budget {least}")
    if least > 1 and isinstance(attempt(planning, least - 1), MemoryPlan):
        wrong.append(f"a plan one byte below the least budget {least}")
    return "refused", wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--proofs", type=int, default=0, help="plans to compile at 2 layers")
    parser.add_argument("--limit-seconds", type=float, default=1800)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, outcomes, failures = random.Random(options.seed), Counter(), []
    began, proved, over = time.monotonic(), 0, []
    for number in tqdm(range(options.requests), disable=None, leave=False):
        wants_proof = proved < options.proofs and time.monotonic() - began < options.limit_seconds
        request = draw(rng, small=wants_proof)
        try:
            planning = planning_for(**request)
            planning = two_layers(planning) if wants_proof else planning
            peaks = [plan.peak_bytes for plan in planning.frontier()]
        except CapacityError as error:
            outcomes["cannot be"] += 1
            if not str(error):
                failures.append(f"{request}: an empty refusal")
            continue
        budget = int(rng.choice((0.3, 0.9, 1.0, 1.05, 2.0)) * rng.choice(peaks))
        outcome, wrong = check(planning, max(budget, 1))
        outcomes[outcome] += 1
        failures += [f"{request}: {text}" for text in wrong]
        plan = attempt(planning, max(budget, 1))
        if wants_proof and isinstance(plan, MemoryPlan):
            shown = prove(plan, place_for(planning.task.device, planning.task.dtype))
            assert shown.proof is not None
            compiled = shown.weights_bytes + shown.reserve_bytes + shown.proof.generation_bytes
            proved += 1
            over.append(plan.peak_bytes / compiled - 1)
            if compiled > budget:
                failures.append(f"{number} {request}: compiled {compiled} over the budget {budget}")
    counts = ", ".join(f"{count} {name}" for name, count in sorted(outcomes.items()))
    print(f"{options.requests} requests: {counts}; {len(failures)} wrong")
    if over:
        most = f"{min(over):.1%} to {max(over):.1%}"
        print(f"{proved} plans compiled at 2 layers: theory over the compiler by {most}")
    print("\n".join(failures))
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
