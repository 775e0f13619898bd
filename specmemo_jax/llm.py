"""The front door: a model, a drafter and a plan behind ``generate``, ``chat`` and ``stream``."""

import contextlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from specmemo_jax.batch import BatchSummary, run_batch
from specmemo_jax.checkpoints.open import open_model
from specmemo_jax.checkpoints.tokenizer import Tokenizer
from specmemo_jax.decode.emitted import BURST
from specmemo_jax.devices.allocator import check_allocator, limit_allocator
from specmemo_jax.devices.compiler import compilation_folder, enable_compilation_cache
from specmemo_jax.devices.quiet import live_devices
from specmemo_jax.devices.table import live_device
from specmemo_jax.draft import Drafter, is_model_name
from specmemo_jax.draft.load import open_drafter
from specmemo_jax.engine.engine import Engine
from specmemo_jax.engine.executables import ExecutableStore
from specmemo_jax.engine.program_cache import ProgramCache
from specmemo_jax.engine.programs import Programs, tuning_bytes
from specmemo_jax.engine.request import Request
from specmemo_jax.errors import RequestError
from specmemo_jax.files.byte_size import parse_bytes
from specmemo_jax.llama.config import LlamaConfig
from specmemo_jax.llama.packing import Target, abstract_target, pack
from specmemo_jax.memory.plan import MemoryPlan
from specmemo_jax.planning.request import (
    cache_source,
    candidates_for,
    drafter_named,
    dtype_for,
    kv_dtype_for,
    speed_for,
    workload_for,
)
from specmemo_jax.planning.search import PlanRequest, search
from specmemo_jax.serve.outputs import RequestOutput
from specmemo_jax.serve.params import SamplingParams
from specmemo_jax.serve.requests import (
    checked_ids,
    checked_stop_ids,
    device_sampling,
    most_new_tokens,
    pad_bad_words,
)
from specmemo_jax.serve.serve import Job, TextStream, serve
from specmemo_jax.serve.text import AnswerText
from specmemo_jax.serve.turn import Turn

Message = Mapping[str, str]
Prompt = str | Sequence[int]
Progress = Callable[[RequestOutput], object]
Policy = Literal["plan", "unbounded", "unbounded-last-row"]


class LLM:
    """A target model that answers prompts, drafted for by ``drafter``; a context manager.

    It may be used from several threads, whose calls take turns: each waits until the one that runs has
    ended, a stream until it is closed or read to its end. A second call in the thread whose stream is open
    is refused.

    Args:
        model: a name under ``models/``, a Hugging Face folder or hub id, a ``.gguf`` file,
            or a `LlamaConfig` together with ``params``.
        params: with a config, the canonical tensors by name (`LlamaConfig.tensor_shapes`),
            as `specmemo_jax.testing.tiny_llama` makes them.
        drafter: ``"auto"`` (what the plan expects most of), ``"ngram"``, ``"self:K"`` (the target's first K
            layers), a draft model as ``model`` names one, a trained head by its folder, hub id or zoo
            name (docs/drafters.md), None for plain decoding, or any `specmemo_jax.draft.Drafter`.
        tree_nodes: T, the most nodes a built-in drafter proposes a step, root included.
        memory_budget: bytes on the device (an int or ``"1GiB"``) that the plan must
            stay under; None: what the device says it has.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``: float32 on CPU,
            bfloat16 on a GPU that has it, else float16.
        kv_cache_dtype: of the target's keys and values: ``"auto"`` (as the weights) or ``"int8"``, which is
            lossy (docs/memory-model.md has its measured effect); drafting stays exact over such a cache.
        max_context: most tokens of prompt and answer together; None: the model's own
            maximum, or what the budget allows.
        max_batch: B, rows decoded together; ``"auto"``: as many as are expected to pay under the budget.
        request_tokens: tokens, prompt and answer, of requests like those to come; rows then lie in groups
            of fitting width, where that saves memory (docs/memory-model.md).
        prompt_tokens, new_tokens: of a usual request, for the plan's expected speed; 512 and 128 at most
            where they are left open. A row may hold more, up to ``max_context``.
        scoring: plan for `log_likelihoods`, too.
        policy: ``"plan"``, or the baselines that benchmarks compare it with: ``"unbounded"`` allocates
            what other speculative decoders do, ``"unbounded-last-row"`` that without every prompt logit.
        adaptive: move between the plan's trees as they pay, down to plain decoding. False makes runs
            repeatable in bfloat16 and float16 too.
        seed: where requests without a seed of their own get theirs, in the order they come.
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
        drafter: Drafter | str | Path | None = "auto",
        tree_nodes: int | None = None,
        memory_budget: int | str | None = None,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        kv_cache_dtype: Literal["auto", "int8"] = "auto",
        max_context: int | None = None,
        max_batch: int | Literal["auto"] = 1,
        request_tokens: Sequence[int] = (),
        prompt_tokens: int | None = None,
        new_tokens: int | None = None,
        scoring: bool = False,
        policy: Policy = "plan",
        adaptive: bool = True,
        seed: int = 0,
        compilation_cache: str | Path | None = None,
    ):
        opened = open_model(model, params)
        self.name, self.config = opened.name, opened.config
        self.generation_defaults = opened.generation_defaults
        spec = live_device()
        chosen = dtype_for(spec, dtype)
        batch = None if max_batch == "auto" else max_batch
        workload = workload_for(self.config, batch, max_context, prompt_tokens, new_tokens, request_tokens)
        kv_dtype = kv_dtype_for(kv_cache_dtype)
        cache = cache_source(self.name, kv_dtype)
        task = PlanRequest(self.config, chosen, spec, workload, 1, policy, kv_dtype, cache, scoring)
        if is_model_name(drafter):
            allowed: Drafter | str | None = open_drafter(
                drafter, opened, tree_nodes, jnp.dtype(chosen), task.platform
            )
        else:
            allowed = drafter_named(drafter, tree_nodes, self.config, task)
        self.plan: MemoryPlan = search(
            task,
            candidates_for(allowed, self.name, task, tree_nodes),
            speed_for(task, self.name),
            None if memory_budget is None else parse_bytes(memory_budget),
        )
        needed = self.plan.peak_bytes - spec.reserve_bytes
        limit_allocator(needed, spec)
        device = live_devices()[0]
        pool = check_allocator(needed, [device])
        self._seeds, self._turn = np.random.default_rng(seed), Turn()
        weights = abstract_target(self.config, jnp.dtype(chosen), device.platform)
        folder = compilation_folder(compilation_cache)
        store = ExecutableStore.in_folder(folder, weights, self.plan.shapes)
        if store is None:  # else every program is kept whole, and JAX would keep it once more
            enable_compilation_cache(compilation_cache)
        compiled = ProgramCache(Programs(weights, self.plan.shapes), store)
        compiled.fetch_recent()
        if pool is not None and pool - needed < tuning_bytes(weights):
            compiled.fill()  # now, while the weights' room is free to try kernels in
        self.target: Target = pack(self.config, opened.tensors(), jnp.dtype(chosen), device)
        self.tokenizer, self._no_tokenizer = opened.texts()
        self.engine = Engine(self.target, self.plan, adaptive, compiled)
        self._own_draft = not isinstance(drafter, Drafter)  # a given object may go on with its weights

    @property
    def drafter(self) -> Drafter | None:
        """What guesses; None for plain decoding."""
        return self.engine.drafter

    def __enter__(self) -> "LLM":
        self._turn.check()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the cache and the weights on the device. The object cannot be used again.

        A call that runs in another thread is waited for; this thread's own open stream ends, with the finish
        reason ``"abort"``. Closing again does nothing, and neither does closing in a forked child.
        """
        if not self._turn.close():
            return
        self.engine.close()
        self.engine.runner.programs.close()
        drafted = jax.tree.leaves(self.engine.draft_weights) if self._own_draft else ()
        for leaf in (*drafted, *self.target.leaves):
            leaf.delete()

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: generation_config.json's, else the config's, else the tokenizer's."""
        tokenizer_ids = self.tokenizer.eos_token_ids if self.tokenizer else ()
        return self.generation_defaults.eos_token_ids or tuple(tokenizer_ids)

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's authors chose (generation_config.json), and vLLM's defaults beside it."""
        defaults = self.generation_defaults
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        chosen = {name: getattr(defaults, name) for name in names}
        return SamplingParams(**{name: value for name, value in chosen.items() if value is not None})

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Progress | None = None,
    ) -> list[RequestOutput]:
        """Complete each prompt: a string, a list of strings, or a list of token-id lists.

        Returns one `RequestOutput` a prompt, in their order; ``progress`` is called with each
        as it finishes. All requests are checked before the first one starts. Without
        ``sampling_params``, those of `get_default_sampling_params` hold.
        """
        self._turn.check()
        return self._run([prompts] if isinstance(prompts, str) else prompts, sampling_params, progress)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Progress | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, each a list of ``{"role": ..., "content": ...}``."""
        self._turn.check()
        if not messages:
            raise RequestError("an empty conversation: give at least one message")
        conversations: Sequence[Any] = [messages] if isinstance(messages[0], Mapping) else messages
        prompts = [self.need_tokenizer().chat_ids(conversation) for conversation in conversations]
        return self._run(prompts, sampling_params, progress)

    def stream(
        self, prompt: Prompt | Sequence[Message], sampling_params: SamplingParams | None = None
    ) -> TextStream:
        """Answer one prompt (a string, token ids, or a conversation) as text pieces, as they are known.

        A piece never ends inside a character and never shows a part of a stop string.
        """
        self._turn.check()
        self.need_tokenizer("streams")
        if not isinstance(prompt, str) and prompt and isinstance(prompt[0], Mapping):
            prompt = self.need_tokenizer().chat_ids(prompt)  # type: ignore[arg-type]
        job = self.job(prompt, sampling_params or self.get_default_sampling_params(), 0)  # type: ignore[arg-type]
        return TextStream(self.run_jobs([job], burst=1), job)

    def log_likelihoods(self, ids: Sequence[int], begin: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Of each of ``ids`` from position ``begin`` on: its natural log probability after those before it
        (float), and whether it is the likeliest token there (bool). Needs ``LLM(..., scoring=True)``.

        Raises RequestError for ids or a beginning that cannot be, CapacityError without room.
        """
        self._turn.check()
        ids = self.prompt_ids(ids, 0)
        if not 1 <= begin < len(ids):
            would = f"from 1 to {len(ids) - 1}" if len(ids) > 1 else "two ids at least"
            raise RequestError(f"begin {begin} of {len(ids)} ids; {would} would work")
        if len(ids) > self.plan.context:
            raise RequestError(f"{len(ids)} ids to score, the context holds {self.plan.context}")
        with self._turn.held():
            return self.engine.score(ids, begin)

    def run_batch(
        self,
        requests: str | Path,
        results: str | Path,
        *,
        sampling_params: SamplingParams | None = None,
        seed: int = 0,
        resume: bool = False,
        retry_errors: bool = False,
        unordered: bool = False,
        served_name: str | None = None,
        progress: Callable[[BatchSummary], None] | None = None,
    ) -> BatchSummary:
        """Answer a JSONL file of requests, row by row into another.

        A line is OpenAI's (``custom_id``, ``method``, ``url``, ``body``), or a body as it is:
        ``{"prompt": ...}`` or ``{"messages": ...}`` with sampling parameters beside it. Rows are OpenAI's,
        each appended and flushed as it ends; a line that cannot be answered becomes a row with its error,
        and the rest goes on. Lines are streamed in and out, so that memory does not grow with them.

        Args:
            sampling_params: what a line leaves open; None: `get_default_sampling_params`.
            seed: gives each line without a seed of its own one, by its custom_id or number.
            resume: go on with what ``results`` holds: no row is lost and none is written twice.
            retry_errors: as ``resume``, with the rows of errors taken out and asked again.
            unordered: write rows as they end, not in the lines' order.
            served_name: what ``model`` in the bodies may say beside the model's own name, and the rows say.
            progress: called with the counts so far after each row.

        Raises RequestError where the requests cannot be read or the results are of other settings, and
        `specmemo_jax.files.rows.OutputError` where rows cannot be written; what was written stays.
        """
        self._turn.check()
        return run_batch(
            self,
            requests,
            results,
            defaults=sampling_params or self.get_default_sampling_params(),
            seed=seed,
            resume=resume,
            retry_errors=retry_errors,
            unordered=unordered,
            served_name=served_name,
            progress=progress,
        )

    def _run(
        self,
        prompts: Sequence[Any],
        given: SamplingParams | Sequence[SamplingParams] | None,
        progress: Progress | None,
    ) -> list[RequestOutput]:
        if given is None or isinstance(given, SamplingParams):
            given = [given or self.get_default_sampling_params()] * len(prompts)
        if len(given) != len(prompts):
            raise RequestError(
                f"{len(given)} SamplingParams for {len(prompts)} prompts; give one, or one each"
            )
        jobs = [self.job(*pair, place) for place, pair in enumerate(zip(prompts, given, strict=True))]
        with contextlib.closing(self.run_jobs(jobs)) as running:
            for job in running:
                if job.output is not None and progress is not None:
                    progress(job.output)
        return [job.output for job in jobs if job.output is not None]

    def run_jobs(
        self, jobs: Iterable[Job], burst: int = BURST, ahead: int | None = None
    ) -> Generator[Job, None, None]:
        """`specmemo_jax.serve.serve.serve`: the jobs, each whenever it has grown. A call that fails may have
        eaten its donated buffers, so the next starts afresh.
        """
        self._turn.check()
        return self._turn.known(self._serve(jobs, burst, ahead))

    def _serve(self, jobs: Iterable[Job], burst: int, ahead: int | None) -> Generator[Job, None, None]:
        with self._turn.held():
            try:
                with contextlib.closing(serve(self.engine, jobs, burst, ahead)) as running:
                    yield from running
            except GeneratorExit:
                raise
            except BaseException:
                self.engine.close()
                raise

    def job(self, prompt: Prompt, params: SamplingParams, place: int) -> Job:
        """One prompt, checked, as `run_jobs` takes it; ``place`` names it in errors and is its id."""
        self._turn.check()
        ids = self.prompt_ids(prompt, place)
        request = Request(
            prompt=ids,
            max_tokens=most_new_tokens(ids, params, self.plan.shapes, place),
            stop_ids=checked_stop_ids(params, self.eos_ids, self.config.vocab_size),
            sampling=None if params.is_plain else self._sampling(ids, params),
        )
        if params.stop:
            self.need_tokenizer("stop strings")
        text = None
        if self.tokenizer is not None:
            stop = tuple(params.stop or ())
            text = AnswerText(self.tokenizer, stop, params.min_tokens, params.skip_special_tokens)
        return Job(str(place), prompt if isinstance(prompt, str) else None, request, params, text)

    def _sampling(self, ids: Sequence[int], params: SamplingParams) -> Any:
        words: list[list[int]] = []
        if params.bad_words:
            words = self.need_tokenizer("bad_words").bad_word_ids(tuple(params.bad_words))
        seed = params.seed or 0
        if params.seed is None and not params.is_greedy:
            seed = int(self._seeds.integers(2**63))
        return device_sampling(params, ids, seed, pad_bad_words(words))

    def need_tokenizer(self, what: str = "texts") -> Tokenizer:
        """The tokenizer. Raises RequestError, with the reason, where there is none and ``what`` needs one."""
        if self.tokenizer is None:
            raise RequestError(f"{self._no_tokenizer}, which {what} need; lists of token ids would work")
        return self.tokenizer

    def prompt_ids(self, prompt: Prompt, place: int) -> list[int]:
        """A prompt's token ids. Raises RequestError for what is none."""
        if isinstance(prompt, str):
            ids: list[Any] = self.need_tokenizer().encode(prompt)
        elif isinstance(prompt, Sequence):
            ids = list(prompt)
        else:
            raise RequestError(
                f"prompt {place} is {type(prompt).__name__}; a string or a list of token ids works"
            )
        return checked_ids(ids, self.config.vocab_size, place)
