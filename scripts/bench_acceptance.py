"""How many tokens a step brings: a drafter's accepted length on MT-Bench, by tree, depth and category.

    python scripts/bench_acceptance.py --questions question.jsonl --drafters smollm2-135m-eagle
    python scripts/bench_acceptance.py --questions question.jsonl --drafters ngram --trees 8 16 --every 4
    python scripts/bench_acceptance.py --questions question.jsonl --trees 8:4:2 60:6:10

``question.jsonl`` is FastChat's (``question_id``, ``category``, ``turns``); both turns are asked, the second
with the first's answer before it. Greedy, so that answers do not depend on the drafter: only steps count.
``--trees``: nodes, or nodes:depth:branches. ``length`` counts the bonus token and leaves prefill's token
out; ``depth d`` is the share of steps that came so far. Nothing is timed.
"""

import argparse
import collections
import json
import statistics
import sys
from pathlib import Path

from specmemo_jax import LLM, SamplingParams
from specmemo_jax.checkpoints.zoo import zoo_config
from specmemo_jax.devices.table import live_device
from specmemo_jax.draft import Drafter, TreeShape, make_drafter
from specmemo_jax.draft.beam import BeamDrafter
from specmemo_jax.draft.head_files import names_head
from specmemo_jax.draft.load import open_head_drafter
from specmemo_jax.errors import ConfigError


def main() -> None:
    """Ask, count, print a table a drafter and tree."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--drafters", nargs="+", default=["smollm2-135m-eagle"])
    parser.add_argument("--trees", nargs="+", default=["8:4:2", "16:5:4", "32:6:6", "60:6:10"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--every", type=int, default=1, help="every so many questions, of each category")
    options = parser.parse_args()
    questions = chosen([json.loads(line) for line in options.questions.open()], options.every)
    print(
        f"{options.model}, {options.dtype}, {len(questions)} questions of two turns, "
        f"up to {options.new_tokens} tokens each"
    )
    for name in options.drafters:
        for tree in options.trees:
            lengths = accepted(name, tree, questions, options)
            report(f"{name} {tree}", lengths)


def chosen(questions: list[dict], every: int) -> list[dict]:
    """Every so many of each category, in order."""
    seen: collections.Counter[str] = collections.Counter()
    kept = []
    for question in questions:
        if seen[question["category"]] % every == 0:
            kept.append(question)
        seen[question["category"]] += 1
    return kept


def drafter_of(name: str, tree: str, options: argparse.Namespace) -> Drafter:
    """A head with the tree asked for, or another drafter with as many nodes."""
    nodes, *rest = map(int, tree.split(":"))
    platform = "cpu" if live_device().platform == "cpu" else "gpu"
    if names_head(name):
        shape = TreeShape(nodes, *rest) if rest else TreeShape.of(nodes)
        return open_head_drafter(name, zoo_config(options.model), shape, options.dtype, platform)
    made = make_drafter(name, nodes, platform=platform, dtype=options.dtype)
    if made is None or (rest and not isinstance(made, BeamDrafter)):
        raise ConfigError(f"drafter {name!r} with tree {tree!r}; a number of nodes would work")
    return made


def accepted(
    name: str, tree: str, questions: list[dict], options: argparse.Namespace
) -> dict[str, list[int]]:
    """Tokens of every step, by category."""
    found: dict[str, list[int]] = collections.defaultdict(list)
    drafter = drafter_of(name, tree, options)
    params = SamplingParams(temperature=0, max_tokens=options.new_tokens)
    with LLM(
        options.model,
        drafter=drafter,
        dtype=options.dtype,
        max_batch=options.batch,
        max_context=2048,
        adaptive=False,
    ) as llm:
        chats = [[{"role": "user", "content": question["turns"][0]}] for question in questions]
        for turn in range(2):
            outputs = llm.chat(chats, params)
            for question, chat, output in zip(questions, chats, outputs, strict=True):
                found[question["category"]] += output.metrics.accepted_lengths
                chat.append({"role": "assistant", "content": output.outputs[0].text})
                if turn == 0:
                    chat.append({"role": "user", "content": question["turns"][1]})
    return found


def report(title: str, lengths: dict[str, list[int]]) -> None:
    """A line of means by category, and one by depth."""
    every = [length for of_category in lengths.values() for length in of_category]
    deepest = max(every)
    shares = " ".join(
        f"{sum(length > depth for length in every) / len(every):.2f}" for depth in range(1, deepest)
    )
    print(f"{title}: length {statistics.mean(every):.2f} over {len(every)} steps; by depth {shares}")
    print(
        "    " + ", ".join(f"{category} {statistics.mean(own):.2f}" for category, own in lengths.items()),
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
