"""One prompt, many ways to choose words; and a seed's answer, the same whatever drafts for it.

    python scripts/examples/sampling.py

The noise of a draw belongs to the seed and the position, not to the step or the tree, so a drafter
changes the speed and never the words. In float32 that is exact, and checked here.
"""

import argparse

from specmemo_jax import LLM, SamplingParams

STORY = [{"role": "user", "content": "Write one sentence about a robot who paints."}]


def ways(max_tokens: int) -> dict[str, SamplingParams]:
    """Sampling parameters by what they do; fields and meanings are vLLM's."""
    return {
        "greedy": SamplingParams(temperature=0, max_tokens=max_tokens),
        "temperature 0.7, seed 1": SamplingParams(temperature=0.7, seed=1, max_tokens=max_tokens),
        "temperature 0.7, seed 2": SamplingParams(temperature=0.7, seed=2, max_tokens=max_tokens),
        "seed 1 once more": SamplingParams(temperature=0.7, seed=1, max_tokens=max_tokens),
        "top_p 0.9, top_k 40": SamplingParams(top_p=0.9, top_k=40, seed=1, max_tokens=max_tokens),
        "min_p 0.1": SamplingParams(min_p=0.1, seed=1, max_tokens=max_tokens),
        "no 'robot', no repeats": SamplingParams(
            temperature=0, repetition_penalty=1.2, bad_words=["robot"], max_tokens=max_tokens
        ),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model", default="smollm2-135m-instruct", help="a name, folder, .gguf file or hub id"
    )
    parser.add_argument("--drafters", nargs="+", default=["none", "ngram", "self:8"])
    parser.add_argument("--max-tokens", type=int, default=32, help="most new tokens an answer")
    options = parser.parse_args(argv)

    named = ways(options.max_tokens)
    answers: dict[str, list[tuple[int, ...]]] = {}
    for drafter in options.drafters:
        with LLM(options.model, drafter=drafter, dtype="float32", max_batch=4, max_context=512) as llm:
            outputs = llm.chat([STORY] * len(named), list(named.values()))
        answers[drafter] = [output.outputs[0].token_ids for output in outputs]
        if drafter == options.drafters[0]:
            for way, output in zip(named, outputs, strict=True):
                print(f"{way}:\n  {output.outputs[0].text.strip()}")
            print()
        steps = sum(output.metrics.steps for output in outputs)
        print(f"{drafter:<8} {sum(map(len, answers[drafter]))} tokens in {steps} target passes")

    first, *others = answers.values()
    seeded = dict(zip(named, first, strict=True))
    assert seeded["temperature 0.7, seed 1"] == seeded["seed 1 once more"], "a seed did not repeat"
    assert all(other == first for other in others), "a drafter changed an answer"
    print("A seed gives the same answer each time, and with every drafter.")


if __name__ == "__main__":
    main()
