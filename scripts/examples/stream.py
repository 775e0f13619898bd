"""Text while it is generated: pieces, stop strings, leaving early, and the outcome afterwards.

    python scripts/examples/stream.py

Ctrl-C ends the answer that is being written, and the next one starts.
"""

import argparse
import itertools

from specmemo_jax import LLM, SamplingParams
from specmemo_jax.serve.serve import TextStream


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model", default="smollm2-135m-instruct", help="a name, folder, .gguf file or hub id"
    )
    parser.add_argument("--max-tokens", type=int, default=120, help="most new tokens an answer")
    options = parser.parse_args(argv)
    greedy = SamplingParams(temperature=0, max_tokens=options.max_tokens)

    with LLM(options.model, max_context=1024) as llm:
        print("-- A chat, to its end:")
        show(llm.stream([{"role": "user", "content": "Write three short sentences about the sea."}], greedy))

        print("-- A text to continue, up to a stop string, which is never shown:")
        counting = SamplingParams(temperature=0, max_tokens=options.max_tokens, stop=["seven", "\n"])
        show(llm.stream("I count in words: one, two, three, four,", counting))

        print("-- A reader that has seen enough after ten pieces:")
        show(llm.stream("Once upon a time", greedy), pieces=10)


def show(stream: TextStream, pieces: int | None = None) -> None:
    """Print pieces as they come, at most so many, then how it ended."""
    with stream:  # whichever way this is left, the request ends and its row is free
        try:
            for piece in itertools.islice(stream, pieces):
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            pass
    if stream.output is None:
        print("[left before the first token]\n")
        return
    answer, metrics = stream.output.outputs[0], stream.output.metrics
    reason = answer.finish_reason + (f" at {answer.stop_reason!r}" if answer.stop_reason else "")
    print(
        f"\n[{reason}; {len(answer.token_ids)} tokens, {metrics.mean_accepted_length:.2f} a step, "
        f"{metrics.tokens_per_second:.1f} tokens/s]\n"
    )


if __name__ == "__main__":
    main()
