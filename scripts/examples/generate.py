"""Several prompts decoded together: the memory plan, the answers, and what speculation saved.

python scripts/examples/generate.py
"""

import argparse

from specmemo_jax import LLM, SamplingParams

QUESTIONS = (
    "Why is the sky blue? Answer in two sentences.",
    "List the even numbers from 2 to 30, one on each line.",
    "Name three animals that live in the sea.",
    "Repeat word for word: the rain falls on the roof at night, the rain falls on the window light.",
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model", default="smollm2-135m-instruct", help="a name, folder, .gguf file or hub id"
    )
    parser.add_argument("--max-tokens", type=int, default=64, help="most new tokens an answer")
    options = parser.parse_args(argv)

    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    greedy = SamplingParams(temperature=0, max_tokens=options.max_tokens)
    # Two rows for four prompts: a row that ends makes room for the next prompt.
    with LLM(options.model, drafter="ngram", max_batch=2, max_context=1024) as llm:
        print(llm.plan.table())
        # The same for texts as they are: llm.generate(["Once upon a time"], greedy).
        outputs = llm.chat(chats, greedy)

    for question, output in zip(QUESTIONS, outputs, strict=True):
        answer, metrics = output.outputs[0], output.metrics
        print(f"\n> {question}\n{answer.text.strip()}")
        print(
            f"[{len(answer.token_ids)} tokens ({answer.finish_reason}) in {metrics.steps} steps, "
            f"{metrics.mean_accepted_length:.2f} a step; {metrics.tokens_per_second:.1f} tokens/s, "
            f"the first after {metrics.time_to_first_token_s:.2f} s]"
        )


if __name__ == "__main__":
    main()
