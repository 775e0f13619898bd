"""From what was asked to what the engine takes: checked ids, budgets, and settings as the device has them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from specmemo_jax.decode.sampling import MAX_BAD_WORDS, Sampling
from specmemo_jax.errors import RequestError
from specmemo_jax.memory.shapes import Shapes
from specmemo_jax.serve.params import SamplingParams

LARGEST = float(np.finfo(np.float32).max)  # a temperature, at which all tokens are as likely


def checked_ids(ids: Sequence[Any], vocab_size: int, place: int) -> list[int]:
    """The ids of prompt ``place``. Raises RequestError for one that is no token's, and for none at all."""
    if not ids:
        raise RequestError(f"prompt {place} is empty: at least one token is needed")
    for token in ids:
        integer = isinstance(token, int) and not isinstance(token, bool)
        if not integer or not 0 <= token < vocab_size:
            raise RequestError(
                f"prompt {place} holds {token!r}; token ids are integers from 0 to {vocab_size - 1}"
            )
    return list(ids)


def checked_stop_ids(params: SamplingParams, eos_ids: tuple[int, ...], vocab_size: int) -> tuple[int, ...]:
    """All ids that end a request. Raises RequestError for one that is no token's, or too many."""
    for token in params.stop_token_ids or ():
        if token >= vocab_size:
            raise RequestError(f"stop_token_ids holds {token}; ids from 0 to {vocab_size - 1} would work")
    return params.end_ids(eos_ids)


def most_new_tokens(prompt: Sequence[int], params: SamplingParams, shapes: Shapes, place: int) -> int:
    """Tokens that an answer may have. Raises RequestError where prompt and answer do not fit the context."""
    context = shapes.context
    wanted = max(1, params.min_tokens) if params.max_tokens is None else params.max_tokens
    if len(prompt) + wanted > context:
        raise RequestError(
            f"prompt {place} has {len(prompt)} tokens and may grow by {wanted}, "
            f"the context holds {context}: shorten it, lower max_tokens"
            + (" or raise max_context" if context < shapes.config.max_context else "")
        )
    return context - len(prompt) if params.max_tokens is None else params.max_tokens


def device_sampling(
    params: SamplingParams, prompt: Sequence[int], seed: int, bad_words: np.ndarray
) -> Sampling:
    """What a row's device settings are for ``params``: host scalars, and ``bad_words`` ``[W, L]``."""
    greedy = params.is_greedy
    return Sampling(
        temperature=np.float32(0 if greedy else min(params.temperature, LARGEST)),
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


def pad_bad_words(words: Sequence[Sequence[int]]) -> np.ndarray:
    """Token sequences right-aligned in ``[W, L]``, padded with -1. Raises RequestError if they do not fit."""
    most, longest = MAX_BAD_WORDS
    if len(words) > most or any(len(word) > longest for word in words):
        raise RequestError(
            f"bad_words make {len(words)} token sequences, the longest of {max(map(len, words))}; "
            f"at most {most} of at most {longest} tokens work"
        )
    padded = np.full(MAX_BAD_WORDS, -1, np.int32)
    for row, word in zip(padded, words, strict=False):
        row[-len(word) :] = word
    return padded
