"""Write tests/data/golden_llama.json: logits of tiny random Llamas by transformers + torch.

Needs torch (not a dependency of this project): ``pip install torch``, then
``python scripts/make_golden.py``. The weights are not stored: they follow from the seed.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from specmemo_jax.llama.config import LlamaConfig
from specmemo_jax.testing import tiny_llama

OUT = Path(__file__).parent.parent / "tests" / "data" / "golden_llama.json"
BASE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama-1: multi-head, untied": {"num_key_value_heads": 4, "rms_norm_eps": 1e-6},
    "llama-2-70b: grouped": {},
    "multi-query": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "head_dim larger than H/N": {"head_dim": 16},
    "head_dim smaller than H/N": {"head_dim": 4},
    "rope_theta, new spelling": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "rope_theta, old spelling": {"rope_theta": 500000.0},
    "linear, old spelling": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "linear, new spelling": {
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    },
    "llama3, old spelling": {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
    "llama3, new spelling": {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}},
    "dynamic, within the original length": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
}


def torch_logits(raw: dict[str, Any], params: dict[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """Float32 logits ``[T, V]`` of transformers' LlamaForCausalLM on canonical ``params``."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import LlamaConfig as TorchConfig
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(TorchConfig(**raw)).eval().float()
    state = {
        name if name == "lm_head.weight" else f"model.{name}": torch.from_numpy(w)
        for name, w in params.items()
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    model.tie_weights()
    with torch.no_grad():
        return model(torch.from_numpy(ids)[None].long()).logits[0].numpy()


def main() -> None:
    cases = []
    for seed, (name, changes) in enumerate(VARIANTS.items()):
        raw = {**BASE, **changes}
        ids = np.random.default_rng(1000 + seed).integers(0, raw["vocab_size"], 40)
        params = tiny_llama(LlamaConfig.from_dict(raw), seed)
        logits = torch_logits(raw, params, ids)[[0, 7, 20, 39]]
        cases.append(
            {
                "name": name,
                "seed": seed,
                "config": raw,
                "ids": ids.tolist(),
                "rows": [0, 7, 20, 39],
                "logits": [[round(float(x), 6) for x in row] for row in logits],
            }
        )
    OUT.write_text(json.dumps(cases, separators=(",", ":")) + "\n")
    print(f"{len(cases)} variants -> {OUT}")


if __name__ == "__main__":
    main()
