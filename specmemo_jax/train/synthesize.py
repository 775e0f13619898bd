"""Training data from nothing but the target: it asks itself, and answers.

An instruct model that is given its chat template up to the opening of the user's turn goes on with a question
(Magpie, arXiv 2406.08464).
"""

from collections.abc import Callable, Sequence

from specmemo_jax.checkpoints.tokenizer import Tokenizer
from specmemo_jax.errors import RequestError
from specmemo_jax.train.data import Conversation, end_of_turn, question_hash

# generate(prompts, max_tokens, temperature, top_p, seed) -> new ids, the stop id that ended them included
Generate = Callable[[Sequence[Sequence[int]], int, float, float, int], list[list[int]]]
QUESTION_TOKENS = 96
SHORTEST_QUESTION = 8  # characters


def opening(tokenizer: Tokenizer) -> list[int]:
    """The chat template up to where the user's first message begins. Raises RequestError without one."""
    if not tokenizer.has_chat_template:
        raise RequestError("the target has no chat template to ask itself with; --data FILE.jsonl would work")
    mark = "questionplaceholder"
    text = tokenizer.fast.apply_chat_template([{"role": "user", "content": mark}], tokenize=False)
    return list(tokenizer.fast.encode(text[: text.index(mark)], add_special_tokens=False))


def synthesize(
    generate: Generate,
    tokenizer: Tokenizer,
    eos_ids: Sequence[int],
    *,
    count: int,
    answer_tokens: int,
    seed: int,
    temperature: float = 0.7,
    greedy_share: float = 0.5,
    top_p: float = 0.95,
) -> list[Conversation]:
    """About ``count`` conversations: questions that are empty, unended or were asked before are dropped.

    ``greedy_share`` of the answers is greedy, the rest sampled at ``temperature``.
    """
    end, start = end_of_turn(tokenizer, eos_ids), opening(tokenizer)
    asked: dict[str, None] = {}
    for ids in generate([start] * count, QUESTION_TOKENS, 1.0, top_p, seed):
        if ids and ids[-1] in eos_ids:
            text = tokenizer.decode(ids).strip()
            if len(text) >= SHORTEST_QUESTION and "\ufffd" not in text:
                asked[text] = None
    questions = list(asked)
    if not questions:
        raise RequestError("the target asked itself no question that ended; --data FILE.jsonl would work")
    prompts = [tokenizer.chat_ids([{"role": "user", "content": text}]) for text in questions]
    greedy = round(len(prompts) * greedy_share)
    answers: list[list[int]] = []
    if greedy:
        answers += generate(prompts[:greedy], answer_tokens, 0.0, 1.0, seed + 1)
    if greedy < len(prompts):
        answers += generate(prompts[greedy:], answer_tokens, temperature, top_p, seed + 2)
    found = []
    for question, prompt, answer in zip(questions, prompts, answers, strict=True):
        closed = [*answer[:-1], end] if answer and answer[-1] in eos_ids else answer
        if closed and closed != [end]:
            span = (len(prompt), len(prompt) + len(closed))
            found.append(Conversation([*prompt, *closed], [span], question_hash(question)))
    return found
