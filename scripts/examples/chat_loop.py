"""A chat in the terminal over `ChatSession`, answers written as they come.

    python scripts/examples/chat_loop.py
    python scripts/examples/chat_loop.py --temperature 0.7 --max-context 4096

/retry answers again, /reset starts a new conversation; /quit, Ctrl-D, or Ctrl-C at the prompt ends it.
Ctrl-C during an answer stops the answer and keeps what was said. The cache of the turns before stays,
so a turn reads only what is new. `specmemo chat` is this with more commands.
"""

import argparse

from specmemo_jax import LLM, SamplingParams
from specmemo_jax.chat.session import ChatSession, ChatStream
from specmemo_jax.errors import SpecMemoError


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
        session = ChatSession(llm, sampling_params=params)
        print(f"{llm.name}, context {llm.plan.context}. /retry, /reset; /quit ends.")
        while (text := ask()) != "/quit":
            try:
                if text == "/reset":
                    session.clear()
                    print("[a new conversation]")
                elif text:
                    write(session, session.retry() if text == "/retry" else session.send(text))
            except SpecMemoError as error:  # most likely the conversation no longer fits the context
                print(f"[not answered: {error}; /reset starts a new conversation]")


def ask() -> str:
    """What the user says next; /quit at the end of the input."""
    try:
        return input("\n> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return "/quit"


def write(session: ChatSession, answer: ChatStream) -> None:
    """Write an answer as it comes; Ctrl-C ends it, and what was said stays in the chat."""
    with answer:
        try:
            for piece in answer:
                print(piece, end="", flush=True)
            print()
        except KeyboardInterrupt:
            print(" [stopped]")
    if answer.output is not None and answer.output.outputs[0].finish_reason == "length":
        print("[cut: --max-tokens allows more]")
    stats = session.stats
    print(f"[{stats.last_prefilled} tokens read; the chat has {stats.context_used} of {stats.context}]")


if __name__ == "__main__":
    main()
