"""One batch from file to file: rows are appended as they end, and a later run takes up from there."""

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Protocol

from specmemo_jax.batch.lines import Line, LineError, read_lines
from specmemo_jax.batch.results import (
    answer_row,
    drop_errors,
    early_rows,
    error_row,
    fingerprint,
    rows_done,
)
from specmemo_jax.checkpoints.tokenizer import Tokenizer
from specmemo_jax.errors import CapacityError, RequestError
from specmemo_jax.files.rows import OutputError, Sink
from specmemo_jax.llama.config import LlamaConfig
from specmemo_jax.memory.plan import MemoryPlan
from specmemo_jax.serve.outputs import RequestOutput
from specmemo_jax.serve.params import SamplingParams
from specmemo_jax.serve.serve import Job

SAMPLED = 1000  # lines that rows are laid out for
AHEAD = 64  # jobs a row of the engine that wait, so that what they need is compiled together


@dataclasses.dataclass
class BatchSummary:
    """Counts of a run: lines answered, lines that became errors, and lines an earlier run had done."""

    answered: int = 0
    errors: int = 0
    found_done: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    step_tokens: int = 0
    seconds: float = 0.0

    @property
    def rows(self) -> int:
        """Rows that this run wrote."""
        return self.answered + self.errors

    @property
    def mean_accepted_length(self) -> float:
        """Tokens a row a target pass; 1.0 without any."""
        return self.step_tokens / self.steps if self.steps else 1.0

    def count(self, output: RequestOutput) -> None:
        """Add an answer."""
        self.answered += 1
        self.prompt_tokens += len(output.prompt_token_ids)
        self.new_tokens += len(output.outputs[0].token_ids)
        self.steps += output.metrics.steps
        self.step_tokens += sum(output.metrics.accepted_lengths)


BatchProgress = Callable[[BatchSummary], None]


class FrontDoor(Protocol):
    """What a batch asks of `specmemo_jax.LLM`."""

    name: str
    config: LlamaConfig
    plan: MemoryPlan

    def need_tokenizer(self, what: str = ...) -> Tokenizer:
        """The tokenizer, or a RequestError."""
        ...

    def prompt_ids(self, prompt: str, place: int) -> list[int]:
        """A text's ids."""
        ...

    def job(self, prompt: str | Sequence[int], params: SamplingParams, place: int) -> Job:
        """A request, checked."""
        ...

    def run_jobs(
        self, jobs: Iterable[Job], burst: int = ..., ahead: int | None = ...
    ) -> Generator[Job, None, None]:
        """The jobs, each whenever it has grown."""
        ...


def run_batch(
    llm: FrontDoor,
    requests: str | Path,
    results: str | Path,
    *,
    defaults: SamplingParams,
    seed: int = 0,
    resume: bool = False,
    retry_errors: bool = False,
    unordered: bool = False,
    served_name: str | None = None,
    progress: BatchProgress | None = None,
) -> BatchSummary:
    """See `specmemo_jax.LLM.run_batch`."""
    source, path = Path(requests), Path(results).expanduser()
    side = Path(f"{path}.early")
    for file in (path, side):
        if source.exists() and file.exists() and source.samefile(file):
            raise RequestError(f"{file} is the requests' own file; another output works")
    model = served_name or llm.name
    numbers = {
        k: float(min(v, 2**64)) if isinstance(v, int) else v for k, v in dataclasses.asdict(defaults).items()
    }
    shapes = llm.plan.shapes
    settings = {
        "model": (Path(llm.name).name, dataclasses.asdict(llm.config), shapes.dtype, shapes.cache_dtype),
        "sampling": numbers,
        "seed": seed,
    }
    mark = fingerprint(settings)
    lines = read_lines(source, frozenset((model, llm.name)), defaults)
    first = list(islice(lines, 1))  # a file that cannot be read is refused before the output is touched
    if path.is_file() and path.stat().st_size and not (resume or retry_errors):
        raise OutputError(f"{path} holds rows already; --resume goes on with it, another output starts anew")
    if side.is_file() and side.stat().st_size and not (resume or retry_errors):
        raise OutputError(
            f"{side} holds rows that a killed run was early with; --resume goes on with them, another output "
            "starts anew"
        )
    advice = "free space and --resume work"
    if retry_errors and path.is_file():
        with Sink(str(path), append=True, advice=advice) as sink:
            sink.lock()
            rows_done(path, mark)
            drop_errors(path)
    with Sink(str(path), append=True, advice=advice) as sink:
        sink.lock()
        done = rows_done(path, mark) if path.is_file() else set()
        early = side if path.is_file() else None
        found = early_rows(early, mark, retry_errors) if early and (resume or retry_errors) else {}
        if early and not found:
            early.unlink(missing_ok=True)
        writer = _Writer(sink, unordered, early, {k: row for k, row in found.items() if k not in done})
        run = _Run(llm, model, mark, seed, done, writer, progress or (lambda _: None))
        return run.answer(chain(first, lines))


def request_tokens(
    requests: str | Path, tokenizer: Tokenizer | None, defaults: SamplingParams, most: int = SAMPLED
) -> tuple[int, ...]:
    """Tokens, prompt and longest answer, of the first ``most`` lines that can be read: what
    ``LLM(request_tokens=...)`` lays rows out for.
    """
    found = []
    for line in islice(read_lines(requests, None, defaults), most):
        if line.error is not None or line.params is None:
            continue
        prompt = line.prompt
        try:
            if tokenizer is not None and line.messages is not None:
                prompt = tokenizer.chat_ids(line.messages)
            elif tokenizer is not None and isinstance(prompt, str):
                prompt = tokenizer.encode(prompt)
        except RequestError:
            continue  # it will be a row that says so
        if prompt is not None and not isinstance(prompt, str):
            found.append(len(prompt) + (line.params.max_tokens or 1))
    return tuple(found)


class _Writer:
    """Rows by their place among the lines to do: as they come, or each when all before it are written.

    Rows that are early wait in memory and, so that a killed run does not ask for them again, in a file beside
    the output. ``found``: those that such a run left there, by their lines' keys.
    """

    def __init__(self, sink: Sink, unordered: bool, early: Path | None, found: Mapping[str, str]):
        self._sink, self._unordered, self._path = sink, unordered, early
        self._next, self._early = 0, dict[int, str]()
        self.found = dict(found)

    def write(self, place: int, row: str) -> None:
        if self._unordered:
            self._sink.write(row)
            return
        self._early[place] = row
        if place > self._next and self._path is not None:
            with Sink(str(self._path), append=True, advice="free space and --resume work") as side:
                side.write(row)
        while self._next in self._early:
            self._sink.write(self._early[self._next])
            del self._early[self._next]
            self._next += 1
        if not self._early and not self.found:
            self.close()

    def close(self) -> None:
        """Every row is where it belongs."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


class _Run:
    """The lines of one run on their way through the engine."""

    def __init__(
        self,
        llm: FrontDoor,
        model: str,
        settings: str,
        seed: int,
        done: Container[str],
        writer: _Writer,
        progress: BatchProgress,
    ):
        self.llm, self.model, self.settings, self.seed = llm, model, settings, seed
        self.done, self.writer, self.progress = done, writer, progress
        self.summary = BatchSummary()
        self._open: dict[int, tuple[int, Line]] = {}  # lines in the engine, by number, and their places

    def answer(self, lines: Iterable[Line]) -> BatchSummary:
        """Write a row for each line that is not done."""
        began = time.perf_counter()
        ahead = AHEAD * self.llm.plan.batch
        with contextlib.closing(self.llm.run_jobs(self._jobs(lines), ahead=ahead)) as running:
            for job in running:
                if job.output is None:
                    continue
                place, line = self._open.pop(int(job.id))
                self.writer.write(place, answer_row(line, job.output, self.model, self.settings))
                self.summary.count(job.output)
                self.summary.seconds = time.perf_counter() - began
                self.progress(self.summary)
        self.writer.close()
        self.summary.seconds = time.perf_counter() - began
        return self.summary

    def _jobs(self, lines: Iterable[Line]) -> Iterator[Job]:
        """What the engine takes; a line that it cannot take is a row at once."""
        place = 0
        for line in lines:
            if line.key in self.done:
                self.summary.found_done += 1
                continue
            if (row := self.writer.found.pop(line.key, None)) is not None:
                self.writer.write(place, row)
                self.summary.found_done += 1
                place += 1
                continue
            try:
                job = job_of(self.llm, line, self.seed)
            except (RequestError, CapacityError) as error:
                found = error if isinstance(error, LineError) else LineError(str(error))
                self.writer.write(place, error_row(line, found, self.settings))
                self.summary.errors += 1
                self.progress(self.summary)
            else:
                self._open[line.number] = place, line
                yield job
            place += 1


def job_of(llm: FrontDoor, line: Line, seed: int, key: str | None = None) -> Job:
    """What the engine takes for a line. One without a seed gets its own, of ``seed`` and its ``key`` (the
    line's, if None): by the line and not by its turn, so that a run that was resumed says the same.

    Raises RequestError or CapacityError for what cannot be answered.
    """
    if line.error is not None:
        raise line.error
    params, prompt = line.params, line.prompt
    assert params is not None
    if params.seed is None and not params.is_greedy:
        digest = hashlib.sha256(f"{seed}/{key or line.key}".encode()).digest()
        params = dataclasses.replace(params, seed=int.from_bytes(digest[:8], "big"))
    if line.messages is not None:
        prompt = tuple(llm.need_tokenizer().chat_ids(line.messages))
    assert prompt is not None
    if isinstance(prompt, str):
        prompt = tuple(llm.prompt_ids(prompt, line.number))
    if not line.has_limit and params.max_tokens is not None:
        room = max(llm.plan.context - len(prompt), 1)
        params = dataclasses.replace(params, max_tokens=min(params.max_tokens, room))
    return llm.job(prompt, params, line.number)
