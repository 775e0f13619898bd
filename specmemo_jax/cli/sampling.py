"""The sampling parameters of every answer: the command line's, the line's own over them, and a seed each."""

import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import typer

from specmemo_jax.errors import RequestError
from specmemo_jax.files.prompts import PromptRecord
from specmemo_jax.serve.params import SamplingParams

TurnParams = tuple[SamplingParams, ...]
_ONLY_SAMPLED = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": None}


def turn_params(records: Sequence[PromptRecord], options: Mapping[str, Any]) -> list[TurnParams]:
    """For each record, one SamplingParams for each of its turns.

    ``options`` are the command line's, by SamplingParams' names; ``temperature`` None is 0. A record's
    own ``params`` lie over them, and its own seed is taken as it is. The other answers have the seeds
    ``options["seed"]``, the next, and so on, in the order of the prompts and their turns, so that equal
    prompts differ and a row's seed repeats it; without one they start at random.

    Raises typer.BadParameter for the command line's values, RequestError, naming the place, for a line's.
    """
    shared = {**options, "temperature": options["temperature"] or 0.0}
    try:
        SamplingParams(**shared)
    except RequestError as error:
        raise typer.BadParameter(str(error)) from error
    seed = shared.pop("seed")
    next_seed = secrets.randbits(32) if seed is None else seed
    answers = []
    for record in records:
        try:
            params = SamplingParams(**{**shared, **record.params})
        except RequestError as error:
            raise RequestError(f"{record.place}: {error}") from error
        own = params.is_greedy or params.seed is not None
        answers.append(
            tuple(params if own else _with_seed(params, next_seed + turn) for turn in range(record.num_turns))
        )
        next_seed += record.num_turns
    if options["temperature"] is None and all(params.is_greedy for turns in answers for params in turns):
        _refuse_idle(options)
    return answers


def _with_seed(params: SamplingParams, seed: int) -> SamplingParams:
    return dataclasses.replace(params, seed=seed % 2**64)


def _refuse_idle(options: Mapping[str, Any]) -> None:
    """A forgotten --temperature would turn these options into nothing."""
    idle = [name for name, default in _ONLY_SAMPLED.items() if options[name] != default]
    if idle:
        names = ", ".join("--" + name.replace("_", "-") for name in idle)
        raise typer.BadParameter(
            f"{names} without --temperature: the likeliest token is taken each time (temperature 0); "
            "a --temperature beside it, such as 0.7, works"
        )
