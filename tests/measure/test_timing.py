import jax.numpy as jnp
import numpy as np
import pytest

from specmemo_jax.draft import NgramDrafter, make_drafter
from specmemo_jax.engine.engine import Engine
from specmemo_jax.errors import ConfigError
from specmemo_jax.llama.packing import pack
from specmemo_jax.measure.timing import part_filled
from specmemo_jax.memory.plan import lay_out
from specmemo_jax.memory.shapes import Shapes
from specmemo_jax.testing import TINY, tiny_llama

TARGET = pack(TINY, iter(tiny_llama().items()), jnp.dtype("float32"))


def engine_for(drafter):
    plan = lay_out(Shapes(TINY, dtype="float32", platform="cpu", batch=2, context=100, drafter=drafter))
    return Engine(TARGET, plan)


def test_part_filled_one_bucket_rows_stay_and_match():
    state = part_filled(engine_for(NgramDrafter(4)), 256)
    assert np.asarray(state.rows.lengths).tolist() == [192, 192]
    assert np.asarray(state.rows.done).all()
    assert len(np.unique(np.asarray(state.draft.history))) == 50


def test_part_filled_several_buckets_is_refused():
    with pytest.raises(ConfigError, match="they verify 1 or 4 or 8 nodes as a match is worth"):
        part_filled(engine_for(make_drafter("ngram", 8)), 256)
