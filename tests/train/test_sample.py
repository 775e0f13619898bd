import jax.numpy as jnp
import numpy as np

from specmemo_jax.checkpoints.open import open_model
from specmemo_jax.llama.packing import pack
from specmemo_jax.testing import TINY, tiny_llama, whole_logits
from specmemo_jax.train.sample import Sampler, _chosen
from specmemo_jax.train.target import load_target

F32 = jnp.dtype("float32")
PARAMS = tiny_llama()
WEIGHTS = load_target(open_model(TINY, PARAMS), F32)


def alone(prompt, count, stop):
    target, ids = pack(TINY, PARAMS.items(), F32), list(prompt)
    for _ in range(count):
        padded = jnp.asarray([ids + [0] * (32 - len(ids))], jnp.int32)
        logits = whole_logits(target, target.leaves, padded, after=slice(len(ids) - 1, len(ids)))
        ids.append(int(logits[0, 0].argmax()))
        if ids[-1] in stop:
            break
    return ids[len(prompt) :]


def test_greedy_answers_are_the_targets_whatever_lies_beside_them():
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]]
    free = [alone(prompt, 8, ()) for prompt in prompts]
    stop = (free[0][3], free[2][5])
    found = Sampler(TINY, WEIGHTS, stop, batch=3)(prompts, 8, 0.0, 1.0, seed=0)
    assert found == [alone(prompt, 8, stop) for prompt in prompts]


def test_sampled_answers_are_a_function_of_the_seed():
    sampler = Sampler(TINY, WEIGHTS, (), batch=2)
    first, again, other = (sampler([[5, 6]] * 3, 6, 1.0, 0.95, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert first[0] != first[1] != first[2]


def test_drawn_tokens_are_of_the_likeliest():
    import jax

    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]] * 512, jnp.float32))
    drawn = np.asarray(_chosen(logits, jax.random.key(0), jnp.float32(1), jnp.float32(0.7)))
    counts = np.bincount(drawn, minlength=4)
    assert counts[2:].sum() == 0
    assert abs(counts[0] / 512 - 0.5 / 0.8) < 0.07
