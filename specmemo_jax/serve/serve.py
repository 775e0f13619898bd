"""Requests through the engine: their answers grow, end, and come out piece by piece."""

import dataclasses
import os
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import islice

from specmemo_jax.decode.emitted import BURST
from specmemo_jax.engine.engine import Engine
from specmemo_jax.engine.request import Request
from specmemo_jax.engine.scheduler import Scheduler
from specmemo_jax.errors import ClosedError
from specmemo_jax.serve.outputs import CompletionOutput, RequestMetrics, RequestOutput
from specmemo_jax.serve.params import SamplingParams
from specmemo_jax.serve.text import AnswerText


@dataclasses.dataclass
class Job:
    """One prompt on its way: what was asked, its `Request` in the engine, its text so far (None without a
    tokenizer), and the `RequestOutput` once it ends.
    """

    id: str
    prompt: str | None
    request: Request
    params: SamplingParams
    text: AnswerText | None = None
    taken: int = 0  # ids that belong to the answer so far
    output: RequestOutput | None = None

    def read(self) -> bool:
        """Take in what the request has emitted; whether the answer has ended."""
        request = self.request
        new = request.new_ids[self.taken :]
        ending = 1 if new and request.stopped else 0  # an end id is kept, and its text is not
        if self.text is not None:
            self.taken += self.text.feed(new[: len(new) - ending])
            if self.text.stop_reason is not None:
                return True
        self.taken = len(request.new_ids)
        return request.finished

    def finish(self, now: float, aborted: bool = False) -> None:
        """Make the output of what the answer holds; ``aborted`` if it did not end by itself."""
        request = self.request
        ids = tuple(request.new_ids[: self.taken])
        stop_reason: str | int | None = None
        reason = "abort" if aborted else "length"
        if self.text is not None:
            self.text.finish()
            stop_reason = self.text.stop_reason
        if aborted:
            stop_reason = None
        elif stop_reason is not None:
            reason = "stop"
        elif ids and ids[-1] in request.stop_ids:
            reason = "stop"
            stop_reason = ids[-1] if ids[-1] in (self.params.stop_token_ids or ()) else None
        accepted = _first(request.accepted_lengths, len(ids) - 1)
        metrics = RequestMetrics(
            steps=len(accepted),
            accepted_lengths=accepted,
            tree_nodes=tuple(request.tree_nodes[: len(accepted)]),
            time_to_first_token_s=request.answered_at - request.admitted_at,
            decode_s=now - request.answered_at if accepted else 0.0,
        )
        text = "" if self.text is None else self.text.text
        answer = CompletionOutput(0, text, ids, reason, stop_reason)
        prompt_ids = tuple(request.ids[: request.num_prompt])
        self.output = RequestOutput(self.id, self.prompt, prompt_ids, (answer,), metrics, not aborted)


def serve(
    engine: Engine, jobs: Iterable[Job], burst: int = BURST, ahead: int | None = None
) -> Generator[Job, None, None]:
    """Run all ``jobs``, in as many rows as the plan has; yields a job whenever its answer has grown.

    It has ended where its ``output`` is set, and comes no more. ``jobs`` are taken as they are needed,
    with ``ahead`` of them waiting (None: all at once, so that what they need is compiled before the
    first starts). Closing the iterator early ends the live ones with the reason ``"abort"`` and frees their
    rows. Raises as `Scheduler.step` does.
    """
    coming, scheduler, pid = iter(jobs), Scheduler(engine), os.getpid()
    unfinished: dict[Request, Job] = {}
    try:
        while True:
            room = None if ahead is None else max(0, ahead - len(scheduler.waiting))
            more = {job.request: job for job in islice(coming, room)}
            scheduler.add(more)
            unfinished |= more
            if not unfinished:
                return
            grown = scheduler.step(burst)
            if not grown and not scheduler.waiting:
                raise ClosedError(
                    "the model was closed while this answer was generated; a new LLM(...) works"
                )
            now = time.perf_counter()
            for request in grown:
                job = unfinished[request]
                if job.read():
                    scheduler.remove(request)
                    job.finish(now)
                    del unfinished[request]
                yield job
    finally:
        now = time.perf_counter()
        if os.getpid() != pid:
            unfinished = {}  # a forked child collects what its parent was doing
        for request, job in unfinished.items():
            scheduler.remove(request)
            if request.begun:
                job.finish(now, aborted=not job.read())


class TextStream:
    """An answer that is being generated: an iterator over its text pieces; a context manager.

    Their sum is the answer's text. Leaving early (`close`, the end of a ``with``, Ctrl-C) ends the
    request; ``output`` then holds what there is, with the finish reason ``"abort"`` (None where it
    had not begun).
    """

    def __init__(self, running: Generator[Job, None, None], job: Job):
        self._running, self._job, self.left = running, job, False  # left: early, by its reader

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
        if not self.left and self.output is not None and not self.output.finished:
            raise ClosedError  # not left by its reader: the model went away
        raise StopIteration

    def close(self) -> None:
        """End the request; nothing happens if it has ended."""
        self.left = True
        self._running.close()

    def __enter__(self) -> "TextStream":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _first(accepted_lengths: Sequence[int], tokens: int) -> tuple[int, ...]:
    """The steps that emitted the first ``tokens`` tokens, the last of them cut where it went beyond."""
    kept, left = [], tokens
    for length in accepted_lengths:
        if left <= 0:
            break
        kept.append(min(length, left))
        left -= kept[-1]
    return tuple(kept)
