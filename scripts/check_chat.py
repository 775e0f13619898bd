"""A long chat inside a budget at its lower bound: no growth, nothing read twice, the same words.

    python scripts/check_chat.py                       # 30 turns on the default model
    python scripts/check_chat.py --turns 10 --max-tokens 16

The plan for the context is searched first, and the chat then runs under its lower bound as the budget.
After every turn the live arrays on the device, the compiler's figure beside them, the process's memory and
the tokens prefilled are noted. The same chat without a budget must say the same in float32. Exit 1 if a
turn reads more than what is new, memory passes the plan, or a word differs.
"""

import argparse
import sys
from pathlib import Path

import jax

from specmemo_jax import LLM, SamplingParams
from specmemo_jax.chat.session import ChatSession
from specmemo_jax.planning.request import planning_for

MIB = 2**20
QUESTIONS = (
    "Give me a short tip for learning to cook.",
    "Why?",
    "Say that again in other words.",
    "What would a beginner get wrong there?",
    "List three things to buy for it.",
)


def resident() -> int:
    """The process's anonymous memory in bytes; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def chat(llm: LLM, options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The answers, and what went wrong."""
    session = ChatSession(llm, sampling_params=SamplingParams(temperature=0, max_tokens=options.max_tokens))
    answers, wrong, most = [], [], 0
    for turn in range(options.turns):
        before, held = llm.engine.prefilled_tokens, len(session.ids)
        output = session.ask(QUESTIONS[turn % len(QUESTIONS)])
        answers.append(output.outputs[0].text)
        read = llm.engine.prefilled_tokens - before
        new = len(output.prompt_token_ids) - held
        live = llm.engine.live_generation_bytes
        arrays = sum(array.nbytes for array in jax.live_arrays())
        most = max(most, live)
        if read > new + 1:
            wrong.append(f"turn {turn + 1} read {read} tokens, {new} were new")
        if live > llm.plan.generation_bytes:
            wrong.append(f"turn {turn + 1} holds {live} bytes, planned were {llm.plan.generation_bytes}")
        print(
            f"turn {turn + 1:3}: {len(session.ids):5} tokens, {read:3} read of {new:3} new, "
            f"live {live / MIB:6.1f} of {llm.plan.generation_bytes / MIB:6.1f} MiB planned, "
            f"all arrays {arrays / MIB:6.1f}, process {resident() / MIB:6.0f} MiB",
            flush=True,
        )
    print(
        f"most generation memory live {most / MIB:.1f} MiB of {llm.plan.generation_bytes / MIB:.1f} planned"
    )
    return answers, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--max-tokens", type=int, default=40)
    parser.add_argument("--max-context", type=int, default=2048)
    options = parser.parse_args()
    bounds = planning_for(options.model, context=options.max_context).plan().bounds
    assert bounds is not None
    print(f"lower bound {bounds.lower_bound / MIB:.1f} MiB for context {options.max_context}")
    shared = {"max_context": options.max_context, "adaptive": False}
    with LLM(options.model, memory_budget=bounds.lower_bound, **shared) as llm:
        print(f"planned: {llm.plan.drafter}, C={llm.plan.shapes.chunks}")
        answers, wrong = chat(llm, options)
    with LLM(options.model, **shared) as llm:
        free, more = chat(llm, options)
    different = sum(a != b for a, b in zip(answers, free, strict=True))
    print(f"answers that differ from the chat without a budget: {different} of {options.turns}")
    print("\n".join(wrong + more))
    return int(bool(wrong or more or different))


if __name__ == "__main__":
    sys.exit(main())
