"""A Llama checkpoint as transformers and torch run it, for comparisons; neither is needed to import this."""

import time
from pathlib import Path
from typing import Any

import numpy as np

from specmemo_jax.checkpoints import open_checkpoint


def torch_model(path: Path, dtype: str) -> Any:
    """transformers' model with the weights that the engine reads, in ``dtype``, ready to generate."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import LlamaConfig, LlamaForCausalLM

    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.ffn_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            max_position_embeddings=config.max_context,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tied_embeddings,
        )
    )
    state = {
        name if name == "lm_head.weight" else f"model.{name}": torch.from_numpy(array.astype(np.float32))
        for name, array in checkpoint.tensors()
    }
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    return model.to(getattr(torch, dtype)).eval()


def timed_answers(model: Any, prompts: list[list[int]], new_tokens: int) -> float:
    """Seconds of one greedy ``generate`` over prompts of one length, so many tokens each."""
    import torch  # pyright: ignore[reportMissingImports]

    ids, length = torch.tensor(prompts), {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    began = time.perf_counter()
    with torch.no_grad():
        model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **length)
    return time.perf_counter() - began
