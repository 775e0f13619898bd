"""What steps said, from a buffer that is written in turns."""

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from specmemo_jax.decode.emitted import BURST, append, drain, init_emitted

NOTE = jax.jit(append, donate_argnums=0)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, BURST), min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_bursts_are_read_in_their_order(bursts, random):
    emitted = init_emitted(2, 3)
    for steps in bursts:
        said = []
        for _ in range(steps):
            width = random.choice([1, 4])  # plain decoding's, and the tree's
            tokens = np.array([[random.randrange(97) for _ in range(width)] for _ in range(2)], np.int32)
            counts = np.array([random.randint(0, width) for _ in range(2)], np.int32)
            live = np.array([random.random() < 0.8 for _ in range(2)])
            emitted = NOTE(emitted, tokens, counts, live)
            said.append((tokens, counts, live))
        for row, (tokens, counts, live) in zip(drain(emitted, steps), said, strict=True):
            assert row[:, 0].tolist() == np.where(live, counts, -1).tolist()
            assert row[:, 1 : 1 + tokens.shape[1]].tolist() == tokens.tolist()
