"""The front door: a model, a drafter and a plan behind ``generate`` and ``chat``."""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from specmemo_jax.compilation import enable_compilation_cache
from specmemo_jax.draft import make_drafter
from specmemo_jax.draft.protocol import Drafter
from specmemo_jax.errors import ConfigError, RequestError
from specmemo_jax.llama.config import LlamaConfig
from specmemo_jax.llama.packing import Target, pack
from specmemo_jax.memory.budget import parse_bytes
from specmemo_jax.memory.devices import default_dtype, device_memory
from specmemo_jax.memory.plan import MemoryPlan, make_plan
from specmemo_jax.outputs import CompletionOutput, RequestMetrics, RequestOutput, SamplingParams
from specmemo_jax.speculate.engine import Engine
from specmemo_jax.tokenizer import Tokenizer, load_tokenizer
from specmemo_jax.weights import GenerationDefaults, generation_defaults, open_checkpoint, resolve

Message = Mapping[str, str]
Progress = Callable[[RequestOutput], None]


class LLM:
    """A target model that answers prompts, drafted for by ``drafter``; a context manager.

    Args:
        model: a name under ``models/``, a Hugging Face folder or hub id, a ``.gguf`` file,
            or a `LlamaConfig` together with ``params``.
        params: with a config, the canonical tensors by name (`LlamaConfig.tensor_shapes`),
            as `specmemo_jax.testing.tiny_llama` makes them.
        drafter: ``"auto"`` (n-grams today), ``"ngram"``, None for plain decoding, or any
            object that implements `specmemo_jax.draft.Drafter`.
        tree_nodes: T, the nodes a built-in drafter proposes a step, root included.
        memory_budget: bytes on the device (an int or ``"1GiB"``) that the plan must
            stay under; None: what the device says it has.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``: float32 on CPU,
            bfloat16 on a GPU that has it, else float16.
        max_context: most tokens of prompt and answer together; None: the model's own
            maximum, or what the budget allows.
        max_batch: B, rows decoded together.
        compilation_cache: folder for compiled programs; None: a folder in the user's
            cache unless JAX is configured already.

    Raises:
        SpecMemoError: one of its subclasses, in one line, for whatever cannot be served.
    """

    def __init__(
        self,
        model: str | Path | LlamaConfig,
        params: Mapping[str, Any] | None = None,
        *,
        drafter: Drafter | str | None = "auto",
        tree_nodes: int | None = None,
        memory_budget: int | str | None = None,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        max_context: int | None = None,
        max_batch: int = 1,
        compilation_cache: str | Path | None = None,
    ):
        self.tokenizer: Tokenizer | None = None
        self._no_tokenizer = "weights given as arrays come without a tokenizer"
        if isinstance(model, LlamaConfig):
            if params is None:
                raise ConfigError("LLM(config) needs params: a mapping of canonical tensor names to arrays")
            self.name, config, tensors = "params", model, iter(params.items())
            self.generation_defaults = GenerationDefaults(config.eos_token_ids)
        else:
            if params is not None:
                raise ConfigError("params go with a LlamaConfig; a name or path brings its own weights")
            found = resolve(model)
            checkpoint = open_checkpoint(found.path)
            self.name, config, tensors = found.name, checkpoint.config, checkpoint.tensors()
            self.generation_defaults = generation_defaults(found.settings_folder, config)
            self.tokenizer, self._no_tokenizer = load_tokenizer(found.path, found.tokenizer_recipe)
        self.config = config
        device = jax.devices()[0]
        chosen = jnp.dtype(default_dtype(device) if dtype == "auto" else _dtype(dtype))
        cheap_nodes = not (device.platform == "cpu" and chosen == jnp.float32)
        self.drafter = make_drafter(drafter, tree_nodes, cheap_nodes=cheap_nodes)
        self.plan: MemoryPlan = make_plan(
            config,
            dtype=chosen,
            platform=device.platform,
            batch=max_batch,
            context=max_context,
            drafter=self.drafter,
            budget=parse_bytes(memory_budget) if memory_budget is not None else device_memory(device),
        )
        enable_compilation_cache(compilation_cache)
        self.target: Target = pack(config, tensors, chosen, device)
        self.engine = Engine(self.target, self.drafter, self.plan)

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the cache and the weights on the device. The object cannot be used again."""
        self.engine.close()
        for leaf in self.target.leaves:
            leaf.delete()

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: generation_config.json's, else the config's, else the tokenizer's."""
        tokenizer_ids = self.tokenizer.eos_token_ids if self.tokenizer else ()
        return self.generation_defaults.eos_token_ids or tuple(tokenizer_ids)

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Progress | None = None,
    ) -> list[RequestOutput]:
        """Complete each prompt: a string, a list of strings, or a list of token-id lists.

        Returns one `RequestOutput` a prompt, in their order; ``progress`` is called with
        each as it finishes. All requests are checked before the first one starts.
        """
        if isinstance(prompts, str):
            prompts = [prompts]
        texts = [prompt if isinstance(prompt, str) else None for prompt in prompts]
        ids = [self._encode(prompt, place) for place, prompt in enumerate(prompts)]
        return self._run(texts, ids, self._params(sampling_params, len(ids)), progress)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Progress | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, each a list of ``{"role": ..., "content": ...}``."""
        if not messages:
            raise RequestError("an empty conversation: give at least one message")
        conversations: Sequence[Any] = [messages] if isinstance(messages[0], Mapping) else messages
        ids = [self._require_tokenizer().chat_ids(conversation) for conversation in conversations]
        for place, prompt in enumerate(ids):
            self._check_ids(prompt, place)
        return self._run([None] * len(ids), ids, self._params(sampling_params, len(ids)), progress)

    def _require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError(f"{self._no_tokenizer}; prompts as lists of token ids would work")
        return self.tokenizer

    def _encode(self, prompt: str | Sequence[int], place: int) -> list[int]:
        if isinstance(prompt, str):
            ids = self._require_tokenizer().encode(prompt)
        elif isinstance(prompt, Sequence):
            ids = list(prompt)
        else:
            raise RequestError(
                f"prompt {place} is {type(prompt).__name__}; a string or a list of token ids works"
            )
        self._check_ids(ids, place)
        return ids

    def _check_ids(self, ids: Sequence[Any], place: int) -> None:
        if not ids:
            raise RequestError(f"prompt {place} is empty: at least one token is needed")
        for token in ids:
            if (
                not isinstance(token, int)
                or isinstance(token, bool)
                or not 0 <= token < self.config.vocab_size
            ):
                raise RequestError(
                    f"prompt {place} holds {token!r}; "
                    f"token ids are integers from 0 to {self.config.vocab_size - 1}"
                )

    def _params(
        self, given: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> list[SamplingParams]:
        if given is None or isinstance(given, SamplingParams):
            return [given or SamplingParams()] * count
        if len(given) != count:
            raise RequestError(f"{len(given)} SamplingParams for {count} prompts; give one, or one each")
        return list(given)

    def _max_tokens(self, prompt: Sequence[int], params: SamplingParams, place: int) -> int:
        context = self.plan.context
        wanted = 1 if params.max_tokens is None else params.max_tokens
        if len(prompt) + wanted > context:
            raise RequestError(
                f"prompt {place} has {len(prompt)} tokens and may grow by {wanted}, "
                f"the context holds {context}: shorten it, lower max_tokens"
                + (" or raise max_context" if context < self.config.max_context else "")
            )
        return context - len(prompt) if params.max_tokens is None else params.max_tokens

    def _run(
        self,
        texts: Sequence[str | None],
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        progress: Progress | None,
    ) -> list[RequestOutput]:
        limits = [self._max_tokens(p, s, i) for i, (p, s) in enumerate(zip(prompts, params, strict=True))]
        stops = [s.stops(self.eos_ids) for s in params]
        waiting = deque(range(len(prompts)))
        started, first = [0.0] * len(prompts), [0.0] * len(prompts)
        results: list[RequestOutput | None] = [None] * len(prompts)
        slots: list[int | None] = [None] * self.plan.batch
        with self._reset_on_error():
            if prompts:
                self.engine.prepare([len(prompt) for prompt in prompts], max(limits))
            while waiting or any(slot is not None for slot in slots):
                for row, slot in enumerate(slots):
                    if slot is None and waiting:
                        i = slots[row] = waiting.popleft()
                        started[i] = time.perf_counter()
                        self.engine.admit(row, prompts[i], limits[i], stops[i])
                        first[i] = time.perf_counter()
                self.engine.burst()
                now = time.perf_counter()
                for row, i in enumerate(slots):
                    log = self.engine.rows[row]
                    if i is None or log is None or not log.finished:
                        continue
                    self.engine.release(row)
                    slots[row] = None
                    metrics = RequestMetrics(
                        steps=len(log.accepted_lengths),
                        accepted_lengths=tuple(log.accepted_lengths),
                        time_to_first_token_s=first[i] - started[i],
                        decode_s=now - first[i] if log.accepted_lengths else 0.0,
                    )
                    answer = CompletionOutput(
                        index=0,
                        text=self.tokenizer.decode(log.new_ids) if self.tokenizer else "",
                        token_ids=tuple(log.new_ids),
                        finish_reason="stop" if log.stopped else "length",
                    )
                    results[i] = output = RequestOutput(
                        str(i), texts[i], tuple(prompts[i]), (answer,), metrics
                    )
                    if progress is not None:
                        progress(output)
        return [output for output in results if output is not None]

    @contextlib.contextmanager
    def _reset_on_error(self):
        """A call that fails halfway may have eaten its donated buffers: start the next one afresh."""
        try:
            yield
        except BaseException:
            self.engine.close()
            raise


def _dtype(name: str) -> str:
    if name not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"dtype {name!r} is not one of auto, float32, bfloat16, float16")
    return name
