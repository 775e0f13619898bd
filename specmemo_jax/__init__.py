"""Speculative decoding that fits in your pocket: memory-planned, exact, in JAX."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specmemo_jax.chat.session import ChatSession
    from specmemo_jax.errors import SpecMemoError
    from specmemo_jax.llama.config import LlamaConfig
    from specmemo_jax.llm import LLM
    from specmemo_jax.memory.plan import MemoryPlan
    from specmemo_jax.serve.outputs import CompletionOutput, RequestMetrics, RequestOutput
    from specmemo_jax.serve.params import SamplingParams

__version__ = "0.1.0"

_WHERE = {
    "LLM": "llm",
    "ChatSession": "chat.session",
    "SamplingParams": "serve.params",
    "RequestOutput": "serve.outputs",
    "CompletionOutput": "serve.outputs",
    "RequestMetrics": "serve.outputs",
    "MemoryPlan": "memory.plan",
    "LlamaConfig": "llama.config",
    "SpecMemoError": "errors",
}
__all__ = [
    "LLM",
    "ChatSession",
    "CompletionOutput",
    "LlamaConfig",
    "MemoryPlan",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "SpecMemoError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    # Lazy, so that `specmemo --help` and reading errors do not wait for JAX.
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
