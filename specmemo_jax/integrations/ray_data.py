"""An offline job over a Ray cluster (extra ``ray``): `Answers` under ``Dataset.map_batches``.

answered = ray.data.read_json("requests.jsonl").map_batches(
    Answers,
    fn_constructor_kwargs={"model": "smollm2-135m-instruct", "max_batch": 8, "max_tokens": 64},
    batch_size=64,
    concurrency=2,  # a model each; num_gpus=1 gives each a GPU of its own
)
"""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from specmemo_jax.batch.lines import Line, line_of
from specmemo_jax.batch.run import job_of
from specmemo_jax.errors import CapacityError, RequestError
from specmemo_jax.llm import LLM
from specmemo_jax.serve.params import SamplingParams

COLUMNS = ("text", "token_ids", "finish_reason", "error")


class Answers:
    """A callable for ``map_batches``: rows in, the same rows with their answers out.

    A row is a plain line of `LLM.run_batch`: ``prompt`` (a text or token ids) or ``messages``, with sampling
    parameters beside it, and maybe a ``custom_id``. Added are ``text``, ``token_ids``, ``finish_reason`` and
    ``error``, which is empty for a row that was answered and says what is wrong with one that could not be.

    Args:
        model, llm_options: of `specmemo_jax.LLM`, one of which every worker has.
        max_tokens, temperature, sampling: what rows leave open (`SamplingParams`).
        seed: gives each row without a seed of its own one, by its custom_id or else by what it holds, so that
            answers do not depend on how rows fall to workers.
        keep: columns that are passed on and not read as parameters, such as an index or a label.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        sampling: dict[str, Any] | None = None,
        seed: int = 0,
        keep: tuple[str, ...] = (),
        **llm_options: Any,
    ):
        self.defaults = SamplingParams(temperature=temperature, max_tokens=max_tokens, **(sampling or {}))
        self.seed, self.keep = seed, frozenset((*keep, *COLUMNS))
        self.llm = LLM(model, **llm_options)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A batch of rows as columns, with the columns of `COLUMNS` added."""
        size = len(next(iter(batch.values()))) if batch else 0
        answers: list[tuple[str, list[int], str, str]] = [("", [], "", "")] * size
        jobs = []
        for place in range(size):
            record = {name: _plain(column[place]) for name, column in batch.items() if name not in self.keep}
            record = {name: value for name, value in record.items() if value is not None}
            line = line_of(record, place, None, self.defaults)
            try:
                jobs.append(job_of(self.llm, line, self.seed, _key(line, record)))
            except (RequestError, CapacityError) as error:
                answers[place] = "", [], "", str(error)
        with contextlib.closing(self.llm.run_jobs(jobs)) as running:
            for job in running:
                if job.output is not None:
                    answer = job.output.outputs[0]
                    reason = answer.finish_reason or ""
                    answers[int(job.id)] = answer.text, list(answer.token_ids), reason, ""
        added = {name: _column([answer[i] for answer in answers]) for i, name in enumerate(COLUMNS)}
        return {**batch, **added}


def _key(line: Line, record: dict[str, Any]) -> str:
    return line.key if line.custom_id is not None else json.dumps(record, sort_keys=True, default=str)


def _plain(value: Any) -> Any:
    """What a cell of a column is as JSON; None for a missing one."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items() if item is not None}
    if isinstance(value, float):  # a column of integers with gaps comes as floats
        return None if math.isnan(value) else int(value) if value.is_integer() else value
    return value


def _column(values: list[Any]) -> np.ndarray:
    column = np.empty(len(values), object)
    column[:] = values
    return column
