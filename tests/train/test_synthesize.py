import pytest

from specmemo_jax.checkpoints.tokenizer import Tokenizer
from specmemo_jax.errors import RequestError
from specmemo_jax.train.synthesize import QUESTION_TOKENS, opening, synthesize

END = 2


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return Tokenizer.from_folder(tiny_model)


def test_the_target_asks_itself_and_answers(tokenizer):
    spell = tokenizer.encode
    asked = ["what is tea?", "what is tea?", "", "how tall is it?", "never ends"]
    calls = []

    def generate(prompts, max_tokens, temperature, top_p, seed):
        calls.append((len(prompts), max_tokens, temperature))
        if max_tokens == QUESTION_TOKENS:
            return [spell(text) + ([] if text == "never ends" else [END]) for text in asked]
        return [[*spell("fine"), END] if temperature == 0 else spell("cut") for _ in prompts]

    found = synthesize(generate, tokenizer, (0, END), count=5, answer_tokens=7, seed=0)
    assert calls == [(5, QUESTION_TOKENS, 1.0), (1, 7, 0.0), (1, 7, 0.7)]
    answers = [tokenizer.decode(c.ids[slice(*c.answers[0])], skip_special_tokens=False) for c in found]
    assert answers == ["fine<|im_end|>", "cut"]
    assert found[1].ids[: found[1].answers[0][0]] == tokenizer.chat_ids(
        [{"role": "user", "content": "how tall is it?"}]
    )


def test_opening_ends_where_the_user_begins(tokenizer):
    assert tokenizer.decode(opening(tokenizer), skip_special_tokens=False) == "<|im_start|>user\n"


def test_a_target_that_asks_nothing_is_refused(tokenizer):
    with pytest.raises(RequestError, match="--data"):
        synthesize(lambda *_: [[5]], tokenizer, (END,), count=1, answer_tokens=4, seed=0)
