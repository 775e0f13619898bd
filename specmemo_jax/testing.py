"""Models that need no files, and logits to hold an engine against, for pytest users."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from specmemo_jax.checkpoints.tokenizer import Tokenizer
from specmemo_jax.llama import kv
from specmemo_jax.llama.config import LlamaConfig
from specmemo_jax.llama.model import forward, logits
from specmemo_jax.llama.packing import Target

TINY = LlamaConfig(
    vocab_size=97,
    hidden_size=32,
    ffn_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_context=256,
)


def tiny_llama(config: LlamaConfig = TINY, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights for ``config``: canonical names to arrays, ready for ``LLM(config, params)``.

    Untied, greedy decoding wanders and repeats itself by turns, which suits tests of drafters.
    """
    rng = np.random.default_rng(seed)
    params = {}
    for name, shape in config.tensor_shapes().items():
        noise = rng.standard_normal(shape).astype(np.float32)
        if name.endswith("norm.weight"):
            params[name] = 1 + 0.1 * noise
        elif name.endswith(".bias"):
            params[name] = 0.1 * noise
        else:
            params[name] = noise / np.float32(np.sqrt(shape[-1]))
    return params


def whole_logits(
    target: Target,
    leaves: Sequence[jax.Array],
    tokens: Int[Array, "B T"],
    *,
    after: slice = slice(None),
    num_layers: int | None = None,
) -> Float[Array, "B after V"]:
    """Logits after every token, or those at ``after`` alone, by one causal pass without a cache: no engine,
    chunk or tree has a part in them.

    ``leaves``: the target's, an argument of their own so that a jitted caller does not make constants of
    them.
    ``num_layers``: only so many first layers, then the final norm and the head.
    """
    config, (B, T) = target.config, tokens.shape
    shape = (B, config.num_kv_heads, 1, config.head_dim)
    nothing = kv.init_cache(num_layers or config.num_layers, shape, target.dtype)
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (B, T, T))
    model = target.merge(leaves)
    hidden, _ = forward(model, (nothing,), tokens, positions, causal, jnp.zeros((B,), jnp.int32))
    return logits(model, hidden[:, after])


def tiny_tokenizer() -> Tokenizer:
    """A byte-level tokenizer of `TINY`'s 97 ids: letters, pieces of words, single bytes of é, 日 and 🙂.

    ``llm.tokenizer = tiny_tokenizer()`` gives an `LLM` made of arrays texts, stop strings and streams.
    """
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Core
    from transformers import PreTrainedTokenizerFast

    # How byte-level tokenizers spell bytes: printable ones as themselves, the rest as letters from U+0100 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelled = {byte: chr(byte) for byte in printable}
    spelled |= {byte: chr(256 + n) for n, byte in enumerate(b for b in range(256) if b not in spelled)}
    alone = sorted({byte for text in ("é日本🙂", ".,!?'\n ") for byte in text.encode()})
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [
        " the",
        " and",
        " a",
        "ing",
        "ly",
        "END",
        "ab",
        "ba",
        "abab",
        " stop",
        "é",
        "日",
        "日本",
        "no",
        " of",
    ]
    words += [first + second for first in "aeiouy" for second in "nrstlmd"]
    tokens = [*(spelled[byte] for byte in alone), *letters]
    tokens += ["".join(spelled[byte] for byte in word.encode()) for word in words]
    vocab = {"<eos>": 0} | {token: i for i, token in enumerate(tokens[: TINY.vocab_size - 1], 1)}
    core = Core(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken("<eos>", special=True)])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>"))
