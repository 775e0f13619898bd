"""A drafter of one's own: a table of what followed each token last, learned on the device.

    python scripts/examples/custom_drafter.py

The answers are plain decoding's whatever a drafter proposes: it can only be more or less often right.
docs/drafters.md has the rules.
"""

import argparse
import dataclasses

import jax.numpy as jnp

from specmemo_jax import LLM, SamplingParams
from specmemo_jax.draft import Drafter
from specmemo_jax.draft.tree import NO_TOKEN, Tree


@dataclasses.dataclass(frozen=True)
class BigramTable(Drafter):
    """Follows the table from the pending token on: a chain of ``num_nodes`` nodes, or less where it
    knows no more. It costs 4 bytes a row and token of the vocabulary, whatever the context.
    """

    vocab_size: int
    num_nodes: int = 4
    name: str = "bigram"

    @property
    def is_chain(self):
        return True

    @property
    def verify_buckets(self):
        return (1, self.num_nodes)  # where no row's token is in the table, a step is plain decoding

    def init(self, groups):
        follower = jnp.full((groups.rows, self.vocab_size), NO_TOKEN, jnp.int32)
        return {"follower": follower, "last": jnp.full((groups.rows,), NO_TOKEN, jnp.int32)}

    def observe(self, view, state, rows, tokens, starts, counts):
        # A row that starts anew forgets the one before it.
        kept = (starts > 0)[:, None]
        follower = state["follower"].at[rows].set(jnp.where(kept, state["follower"][rows], NO_TOKEN))
        last = jnp.where(starts > 0, state["last"][rows], NO_TOKEN)
        before = jnp.concatenate([last[:, None], tokens[:, :-1]], axis=1)
        told = (jnp.arange(tokens.shape[1])[None, :] < counts[:, None]) & (before >= 0)
        # Out of bounds is dropped. Where a chunk has a token twice either may win: both are fair guesses.
        slots = jnp.where(told, before, self.vocab_size)
        follower = follower.at[rows[:, None], slots].set(tokens, mode="drop")
        newest = jnp.take_along_axis(tokens, jnp.maximum(counts - 1, 0)[:, None], axis=1)[:, 0]
        return {"follower": follower, "last": state["last"].at[rows].set(jnp.where(counts > 0, newest, last))}

    def propose(self, view, state, pending, lengths):
        every, chain = jnp.arange(len(pending)), [pending]
        for _ in range(self.num_nodes - 1):
            chain.append(jnp.where(chain[-1] >= 0, state["follower"][every, chain[-1]], NO_TOKEN))
        depths = jnp.broadcast_to(jnp.arange(self.num_nodes), (len(pending), self.num_nodes))
        return Tree(jnp.stack(chain, axis=1), parents=jnp.maximum(depths - 1, 0), depths=depths), state


QUESTIONS = (
    "Repeat this poem twice: The rain falls on the roof at night, the rain falls on the window light.",
    "List the even numbers from 2 to 40, one on each line.",
    "Why is the sky blue?",
)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model", default="smollm2-135m-instruct", help="a name, folder, .gguf file or hub id"
    )
    parser.add_argument("--max-tokens", type=int, default=96, help="most new tokens an answer")
    options = parser.parse_args(argv)
    greedy = SamplingParams(temperature=0, max_tokens=options.max_tokens)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]

    def answer(drafter):
        with LLM(options.model, drafter=drafter, dtype="float32", max_context=512) as llm:
            return llm.chat(chats, greedy), llm.config.vocab_size

    vanilla, vocab_size = answer(None)
    print(f"{'tokens a step':<14}" + "".join(f"{question[:24]:>28}" for question in QUESTIONS))
    for drafter in (BigramTable(vocab_size), "ngram"):
        outputs, _ = answer(drafter)
        for plain, drafted in zip(vanilla, outputs, strict=True):
            assert drafted.outputs[0].token_ids == plain.outputs[0].token_ids, "a drafter changed an answer"
        lengths = "".join(f"{output.metrics.mean_accepted_length:>28.2f}" for output in outputs)
        print(f"{drafter if isinstance(drafter, str) else drafter.name:<14}{lengths}")
    print("Token ids equal plain decoding's in every answer.")


if __name__ == "__main__":
    main()
