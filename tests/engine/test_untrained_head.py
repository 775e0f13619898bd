import dataclasses
import gc
import weakref

import numpy as np
import pytest

from specmemo_jax import LLM, SamplingParams
from specmemo_jax.draft import TreeShape
from specmemo_jax.draft.eagle import EagleDrafter
from specmemo_jax.draft.head_config import HeadConfig, default_taps, head_layer
from specmemo_jax.draft.heads import pack_head
from specmemo_jax.errors import ConfigError, DrafterWarning
from specmemo_jax.testing import TINY, tiny_llama

PROMPTS = [[3, 1, 4], [1, 5, 9, 2], [6, 5], [3, 5, 8, 9]]


def head_that_guesses(token: int) -> EagleDrafter:
    """Of random weights, and with one token alone in its vocabulary."""
    config = HeadConfig("eagle3", head_layer(TINY), default_taps("eagle3", TINY), draft_vocab_size=1)
    rng = np.random.default_rng(0)
    tensors = {
        name: (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)
        for name, shape in config.tensor_shapes().items()
    }
    tensors["d2t"] = np.array([token])
    return EagleDrafter(config, lambda target: pack_head(config, tensors, target), TreeShape.of(3), "float32")


def answers(drafter) -> list[tuple[int, ...]]:
    greedy = SamplingParams(temperature=0, max_tokens=80, ignore_eos=True)
    with LLM(TINY, tiny_llama(), drafter=drafter, max_batch=4, max_context=96, adaptive=False) as llm:
        return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, greedy)]


def test_a_head_that_is_never_right_is_announced_once_and_says_the_same():
    plain = answers(None)
    never = min(set(range(TINY.vocab_size)) - {token for answer in plain for token in answer})
    with pytest.warns(DrafterWarning, match=r"eagle: 1\.00 tokens a step over 256 steps") as caught:
        assert answers(head_that_guesses(never)) == plain
    assert len(caught) == 1


def test_a_head_with_fewer_tokens_than_branches_is_refused():
    with pytest.raises(ConfigError, match="can propose 1 tokens, a tree of 2 branches was asked for"):
        dataclasses.replace(head_that_guesses(5), shape=TreeShape.of(4, 2))


def test_a_head_that_is_given_up_is_freed():
    with LLM(TINY, tiny_llama(), drafter=head_that_guesses(5), max_context=96) as llm:
        llm.generate(PROMPTS[:1], SamplingParams(temperature=0, max_tokens=4))
        weights = [weakref.ref(leaf) for leaf in llm.engine.draft_weights]
        llm.engine.replan(llm.plan.resized(None, 1))
        gc.collect()
        assert not any(ref() for ref in weights)
        llm.generate(PROMPTS[:1], SamplingParams(temperature=0, max_tokens=4))
