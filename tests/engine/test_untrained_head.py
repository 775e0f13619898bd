import numpy as np
import pytest

from specmemo_jax import LLM, SamplingParams
from specmemo_jax.draft import TreeShape
from specmemo_jax.draft.eagle import EagleDrafter
from specmemo_jax.draft.head_config import HeadConfig, default_taps, head_layer
from specmemo_jax.draft.heads import pack_head
from specmemo_jax.errors import DrafterWarning
from specmemo_jax.testing import TINY, tiny_llama

PROMPTS = [[3, 1, 4], [1, 5, 9, 2], [6, 5], [3, 5, 8, 9]]


def random_head() -> EagleDrafter:
    config = HeadConfig("eagle3", head_layer(TINY), default_taps("eagle3", TINY))
    rng = np.random.default_rng(0)
    tensors = {
        name: (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)
        for name, shape in config.tensor_shapes().items()
    }
    return EagleDrafter(config, lambda target: pack_head(config, tensors, target), TreeShape.of(3), "float32")


def answers(drafter, tokens, adaptive):
    greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    with LLM(TINY, tiny_llama(), drafter=drafter, max_batch=4, max_context=160, adaptive=adaptive) as llm:
        outputs = llm.generate(PROMPTS, greedy)
        return [output.outputs[0].token_ids for output in outputs]


def test_a_head_that_is_never_right_is_announced_once_and_says_the_same():
    with pytest.warns(DrafterWarning, match=r"eagle: 1\.0\d tokens a step over 256 steps") as caught:
        found = answers(random_head(), 150, adaptive=False)
    assert len(caught) == 1
    assert found == answers(None, 150, adaptive=True)
