"""Requests through the engine: slots are filled, bursts run, answers end and come out piece by piece."""

import dataclasses
import time
import warnings
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import islice

import jax
import numpy as np

from specmemo_jax.decode.sampling import Sampling
from specmemo_jax.devices.allocator import is_out_of_memory
from specmemo_jax.engine.engine import Engine
from specmemo_jax.engine.recovery import step_down
from specmemo_jax.engine.sequence import Request, RowLog
from specmemo_jax.errors import CapacityWarning, RequestError
from specmemo_jax.memory.footprint import BURST
from specmemo_jax.memory.plan import MemoryPlan
from specmemo_jax.serve.outputs import CompletionOutput, RequestMetrics, RequestOutput
from specmemo_jax.serve.params import SamplingParams
from specmemo_jax.serve.text import AnswerText


@dataclasses.dataclass
class Job:
    """One prompt on its way: what was asked, its row's `Request`, its text so far (None without a
    tokenizer), and the `RequestOutput` once it ends.
    """

    id: str
    prompt: str | None
    request: Request
    params: SamplingParams
    text: AnswerText | None = None
    taken: int = 0  # ids that belong to the answer so far
    started: float = 0.0
    first_token: float = 0.0
    output: RequestOutput | None = None

    def read(self, log: RowLog) -> bool:
        """Take in what the row has emitted; whether the answer has ended."""
        new = log.new_ids[self.taken :]
        ending = 1 if new and log.stopped else 0  # an end id is kept, and its text is not
        if self.text is not None:
            self.taken += self.text.feed(new[: len(new) - ending])
            if self.text.stop_reason is not None:
                return True
        self.taken = len(log.new_ids)
        return log.finished

    def finish(self, log: RowLog, now: float, aborted: bool = False) -> None:
        """Make the output of what the answer holds; ``aborted`` if it did not end by itself."""
        ids = tuple(log.new_ids[: self.taken])
        stop_reason: str | int | None = None
        reason = "abort" if aborted else "length"
        if self.text is not None:
            self.text.finish()
            stop_reason = self.text.stop_reason
        if aborted:
            stop_reason = None
        elif stop_reason is not None:
            reason = "stop"
        elif ids and ids[-1] in log.request.stop_ids:
            reason = "stop"
            stop_reason = ids[-1] if ids[-1] in (self.params.stop_token_ids or ()) else None
        accepted = _first(log.accepted_lengths, len(ids) - 1)
        metrics = RequestMetrics(
            steps=len(accepted),
            accepted_lengths=accepted,
            tree_nodes=tuple(log.tree_nodes[: len(accepted)]),
            time_to_first_token_s=self.first_token - self.started,
            decode_s=now - self.first_token if accepted else 0.0,
        )
        text = "" if self.text is None else self.text.text
        answer = CompletionOutput(0, text, ids, reason, stop_reason)
        prompt_ids = tuple(log.ids[: log.num_prompt])
        self.output = RequestOutput(self.id, self.prompt, prompt_ids, (answer,), metrics, not aborted)


Waiting = tuple[Job, RowLog | None]


def serve(
    engine: Engine, jobs: Iterable[Job], burst: int = BURST, ahead: int | None = None
) -> Generator[Job, None, None]:
    """Run all ``jobs``, in as many rows as the plan has; yields a job whenever its answer has grown.

    It has ended where its ``output`` is set, and comes no more. ``jobs`` are taken as they are needed,
    with ``ahead`` of them waiting (None: all at once, so that what they need is compiled before the
    first starts). Where the device runs out of memory all the same, something is given up
    (`specmemo_jax.engine.recovery`), said in a CapacityWarning, and what was decoding goes on from
    its ids. Closing the iterator early ends the live ones with the reason ``"abort"`` and frees their rows.
    """
    coming, waiting = iter(jobs), deque[Waiting]()
    slots: list[Job | None] = [None] * engine.plan.batch
    prepared = False
    try:
        while True:
            wanted = None if ahead is None else max(0, ahead - len(waiting))
            waiting.extend((job, None) for job in islice(coming, wanted))
            if not waiting and not any(slots):
                return
            try:
                if not prepared:
                    engine.prepare([job.request for job, _ in waiting])
                    prepared = True
                for row, to in engine.make_room():
                    slots[to], slots[row] = slots[row], None
                _fill(engine, slots, waiting)
                engine.burst(burst, len(waiting))
            except jax.errors.JaxRuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                _recover(engine, slots, waiting, error)
                continue
            now = time.perf_counter()
            for row, job in enumerate(slots):
                log = engine.rows[row]
                if job is None:
                    continue
                if log is None:
                    raise RequestError("the model was closed while this answer was generated")
                if job.read(log):
                    job.finish(engine.release(row), now)
                    slots[row] = None
                yield job
    finally:
        now = time.perf_counter()
        for row, job in enumerate(slots):
            log = engine.rows[row]
            if job is not None and log is not None:
                ended = job.read(log)
                job.finish(engine.release(row), now, aborted=not ended)
        for job, log in waiting:
            if log is not None:
                job.finish(log, now, aborted=not job.read(log))


def _fill(engine: Engine, slots: list[Job | None], waiting: deque[Waiting]) -> None:
    """Give every free row what waits longest of what it has room for; a row's log says that it had begun
    and lost its cache.
    """
    place = 0
    while place < len(waiting) and not all(slots):
        job, log = waiting[place]
        free = {row for row, other in enumerate(slots) if other is None}
        row = engine.row_for(job.request.prompt if log is None else log.ids, free)
        if row is None:
            place += 1
            continue
        if log is None:
            job.started = time.perf_counter()
            engine.admit(row, job.request)
            job.first_token = time.perf_counter()
        else:
            engine.rebuild(row, log)
        slots[row] = job
        del waiting[place]


def _recover(engine: Engine, slots: list[Job | None], waiting: deque[Waiting], error: BaseException) -> None:
    """Give something up, and put what was decoding at the head of the queue, to be rebuilt from its ids."""
    begun = [(job, engine.rows[row]) for row, job in enumerate(slots) if job is not None]
    warnings.warn(step_down(engine, error), CapacityWarning, stacklevel=2)
    waiting.extendleft(reversed(begun))
    slots[:] = [None] * engine.plan.batch


class TextStream:
    """An answer that is being generated: an iterator over its text pieces; a context manager.

    Their sum is the answer's text. Leaving early (`close`, the end of a ``with``, Ctrl-C) ends the
    request; ``output`` then holds what there is, with the finish reason ``"abort"`` (None where it
    had not begun).
    """

    def __init__(self, running: Generator[Job, None, None], job: Job):
        self._running, self._job = running, job

    @property
    def output(self) -> RequestOutput | None:
        """The request's outcome, once it has ended."""
        return self._job.output

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        assert self._job.text is not None
        for _ in self._running:
            if piece := self._job.text.piece():
                return piece
        if piece := self._job.text.piece():
            return piece
        raise StopIteration

    def close(self) -> None:
        """End the request; nothing happens if it has ended."""
        self._running.close()

    def __enter__(self) -> "TextStream":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def device_sampling(
    params: SamplingParams, prompt: Sequence[int], seed: int, bad_words: np.ndarray
) -> Sampling:
    """What a row's device settings are for ``params``: host scalars, and ``bad_words`` ``[W, L]``."""
    greedy = params.is_greedy
    return Sampling(
        temperature=np.float32(0 if greedy else params.temperature),
        top_p=np.float32(1 if greedy else params.top_p),
        top_k=np.int32(min(params.top_k, 2**31 - 1) if params.top_k > 0 and not greedy else 2**31 - 1),
        min_p=np.float32(0 if greedy else params.min_p),
        repetition=np.float32(params.repetition_penalty),
        presence=np.float32(params.presence_penalty),
        frequency=np.float32(params.frequency_penalty),
        key=np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32),
        min_length=np.int32(len(prompt) + params.min_tokens),
        bad_words=bad_words,
    )


def pad_bad_words(words: Sequence[Sequence[int]], plan: MemoryPlan) -> np.ndarray:
    """Token sequences right-aligned in the plan's ``[W, L]``, padded with -1; they must fit."""
    padded = np.full(plan.max_bad_words, -1, np.int32)
    for row, word in zip(padded, words, strict=False):
        row[-len(word) :] = word
    return padded


def _first(accepted_lengths: Sequence[int], tokens: int) -> tuple[int, ...]:
    """The steps that emitted the first ``tokens`` tokens, the last of them cut where it went beyond."""
    kept, left = [], tokens
    for length in accepted_lengths:
        if left <= 0:
            break
        kept.append(min(length, left))
        left -= kept[-1]
    return tuple(kept)
