import pytest
from tiny_checkpoints import raw_config

from specmemo_jax.llama.config import LlamaConfig


@pytest.fixture
def config() -> LlamaConfig:
    return LlamaConfig.from_dict(raw_config())
