"""Tokens into a row's cache: prompts chunk by chunk, and what a drafter missed."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from specmemo_jax.decode.rows import MAX_STOP_IDS, Settings
from specmemo_jax.decode.sampling import MAX_BAD_WORDS, plain_sampling
from specmemo_jax.engine.request import Request, history_of
from specmemo_jax.engine.runner import Runner
from specmemo_jax.memory.shapes import Shapes

WHOLE_PROMPT = 64  # the multiple that a prompt read in one piece is padded to


def prefill(runner: Runner, row: int, request: Request, ids: Sequence[int], begin: int) -> int:
    """Read ``ids`` from position ``begin`` on into a row; the token that follows them."""
    first, group = None, runner.shapes.groups_at(0).place(row)[0]
    settings = settings_of(request)
    for start, width in chunks_within(runner, row, begin, len(ids)):
        program = runner.program("prefill", width, request.sampled, group)
        first = runner.run(program, *chunk_of(ids[start : start + width], width, start, row), settings)
    assert first is not None
    return int(first)


def observe(runner: Runner, row: int, ids: Sequence[int], begin: int, end: int) -> None:
    """Tell the drafter of committed tokens that it has not observed: positions ``begin`` to ``end``."""
    group = runner.shapes.groups_at(0).place(row)[0]
    for start, width in chunks_within(runner, row, begin, end):
        inputs = chunk_of(ids[start : min(start + width, end)], width, start, row)
        runner.run(runner.program("catch up", width, group=group), *inputs)


def restore(runner: Runner, row: int, request: Request, kept: int | None = None) -> None:
    """Set what the device knows of a row whose cache holds a request: all of it but the pending token, or
    only the first ``kept`` positions of a prompt that is read on from there.
    """
    ids = request.ids
    prompt, answer = ids[: request.num_prompt], request.new_ids
    length, left = request.num_cached, request.left
    if kept is not None:
        prompt, answer, length, left = ids[:kept], [], kept, request.max_tokens
    settings = dataclasses.replace(settings_of(request), left=np.int32(left))
    inputs = (np.int32(row), np.int32(length), np.int32(ids[length]), settings)
    history = history_of(prompt, answer, runner.target.config.vocab_size, MAX_BAD_WORDS[1] - 1)
    runner.run(runner.program("restore"), *inputs, *history)


def settings_of(request: Request) -> Settings:
    """A request's settings as the device has them."""
    stops = np.full((MAX_STOP_IDS,), -1, np.int32)
    stops[: len(request.stop_ids)] = request.stop_ids
    sampling = request.sampling or plain_sampling()
    return Settings(np.int32(request.max_tokens), stops, sampling)


def chunks_within(runner: Runner, row: int, begin: int, end: int) -> list[tuple[int, int]]:
    """``(start, width)`` of the chunks that cover positions ``begin`` to ``end`` of a row. One that would
    hang over the end of the row's slots begins earlier, and reads some positions again; as wide as the row
    is none but the first, because position 0 is where a row starts anew.
    """
    slots, shapes = runner.slots_of(row), runner.shapes
    if begin and not shapes.whole_prompts and shapes.chunks[0] == slots:
        chunks = [(offset, shapes.chunks[-1]) for offset in range(0, end - begin, shapes.chunks[-1])]
    else:
        chunks = chunk_starts(shapes, end - begin)
    return [(min(begin + offset, slots - width), width) for offset, width in chunks]


def chunk_starts(shapes: Shapes, length: int) -> list[tuple[int, int]]:
    """``(offset, width)`` of the chunks that cover so many tokens: the widest while more is left, then the
    narrowest that holds the rest.
    """
    if shapes.whole_prompts:
        return [(0, -(-length // WHOLE_PROMPT) * WHOLE_PROMPT)] if length else []
    widest, rest = shapes.chunks[0], length % shapes.chunks[0]
    found = [(start, widest) for start in range(0, length - rest, widest)]
    if rest:
        found.append((length - rest, min(width for width in shapes.chunks if width >= rest)))
    return found


def chunk_of(ids: Sequence[int], width: int, start: int, row: int) -> tuple[Any, ...]:
    """A program's inputs for a chunk of ``width`` tokens at position ``start`` of ``row``."""
    tokens = np.zeros((1, width), np.int32)
    tokens[0, : len(ids)] = ids
    return tokens, np.int32(start), np.int32(len(ids)), np.int32(row)
