"""A tiny chat model in Hugging Face's layout, made on the spot."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
from safetensors.numpy import save_file

from specmemo_jax.llama.config import LlamaConfig
from specmemo_jax.testing import tiny_llama

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}
TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(folder: Path) -> None:
    """Bytes as tokens, and ChatML's specials."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(specials + letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in specials])
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(str(folder))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tensors = tiny_llama(LlamaConfig.from_dict(CONFIG))
    save_file({f"model.{name}": tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    make_tokenizer(folder)
    return folder


@pytest.fixture
def broken_model(tiny_model, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "broken"))


@pytest.fixture
def hub_cache(tiny_model, tmp_path, monkeypatch) -> Callable[[str], Path]:
    """An empty hub cache instead of the user's; called with a hub id, it puts the tiny model there."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", partial(huggingface_hub.scan_cache_dir, cache))

    def add(hub_id: str) -> Path:
        repo = cache / f"models--{hub_id.replace('/', '--')}"
        snapshot = repo / "snapshots" / "1234"
        if not snapshot.exists():
            (repo / "refs").mkdir(parents=True)
            (repo / "refs" / "main").write_text("1234")
            (repo / "blobs").mkdir()
            shutil.copytree(tiny_model, snapshot)
        return snapshot

    return add


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SPECMEMO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
