"""A chat in the terminal, answers written as they come.

    python scripts/examples/chat_loop.py
    python scripts/examples/chat_loop.py --temperature 0.7 --max-context 4096

/reset starts a new conversation; /quit, Ctrl-D, or Ctrl-C at the prompt ends it. Ctrl-C during an
answer stops the answer and keeps what was said. Each turn is prefilled from scratch today: the
cache of the turns before is not kept, so the first word takes longer as the conversation grows.
"""

import argparse

from specmemo_jax import LLM, SamplingParams
from specmemo_jax.errors import RequestError


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model", default="smollm2-135m-instruct", help="a name, folder, .gguf file or hub id"
    )
    parser.add_argument("--drafter", default="auto", help="auto, ngram, self:K, none, or a draft model")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest words each time")
    parser.add_argument("--max-tokens", type=int, default=256, help="most new tokens an answer")
    parser.add_argument("--max-context", type=int, default=2048, help="most tokens of a conversation")
    options = parser.parse_args(argv)
    params = SamplingParams(temperature=options.temperature, max_tokens=options.max_tokens)

    with LLM(options.model, drafter=options.drafter, max_context=options.max_context) as llm:
        print(f"{llm.name}, context {llm.plan.context}. /reset starts anew, /quit ends.")
        messages: list[dict[str, str]] = []
        while (text := ask()) != "/quit":
            if text == "/reset":
                messages = []
                print("[a new conversation]")
            elif text:
                messages = answer(llm, messages, text, params)


def ask() -> str:
    """What the user says next; /quit at the end of the input."""
    try:
        return input("\n> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return "/quit"


def answer(
    llm: LLM, messages: list[dict[str, str]], text: str, params: SamplingParams
) -> list[dict[str, str]]:
    """Write the answer to ``text``; the conversation with both, or as it was if nothing was said."""
    asked = [*messages, {"role": "user", "content": text}]
    try:
        stream = llm.stream(asked, params)
    except RequestError as error:  # most likely the conversation no longer fits the context
        print(f"[not answered: {error}; /reset starts a new conversation]")
        return messages
    with stream:
        try:
            for piece in stream:
                print(piece, end="", flush=True)
            print()
        except KeyboardInterrupt:
            print(" [stopped]")
    if stream.output is None:  # stopped before the first word
        return messages
    said = stream.output.outputs[0]
    if said.finish_reason == "length":
        print(f"[cut after {params.max_tokens} tokens; --max-tokens allows more]")
    return [*asked, {"role": "assistant", "content": said.text}] if said.text.strip() else messages


if __name__ == "__main__":
    main()
