"""What a request asks for; names and meanings as in vLLM."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from specmemo_jax.decode.rows import MAX_STOP_IDS
from specmemo_jax.errors import RequestError
from specmemo_jax.files.json_lines import not_unicode

GREEDY_BELOW = 1e-5  # a temperature below is greedy, as in vLLM
NEUTRAL = {"n": 1, "best_of": 1, "use_beam_search": False}
C = TypeVar("C", bound=type)


def _refuse_unknown(reasons: dict[str, str]) -> Callable[[C], C]:
    """Make a dataclass name the arguments that it does not have, and why."""

    def wrap(cls: C) -> C:
        init, known = cls.__init__, {field.name for field in dataclasses.fields(cls)}

        @functools.wraps(init)
        def checked(self: Any, /, *args: Any, **kwargs: Any) -> None:
            for name in sorted(kwargs.keys() - known):
                if _is_neutral(name, kwargs[name]):
                    del kwargs[name]  # asks for nothing
                    continue
                reason = reasons.get(name, f"{', '.join(sorted(known))} work")
                raise RequestError(f"SamplingParams has no {name}: {reason}")
            init(self, *args, **kwargs)

        cls.__init__ = checked  # type: ignore[misc]
        return cls

    return wrap


@_refuse_unknown(
    {
        "n": "a prompt has one answer; the prompt several times, with seeds of their own, works",
        "best_of": "a prompt has one answer; the prompt several times, with seeds of their own, works",
        "use_beam_search": "decoding is greedy (temperature=0) or sampled",
        "logprobs": "logits stay on the device",
        "prompt_logprobs": "prompts are read without their logits",
        "logits_processors": "the device decodes without the host; temperature, penalties and bad_words work",
        "logit_bias": "penalties and bad_words work",
        "guided_decoding": "there is no grammar support",
        "structured_outputs": "there is no grammar support",
    }
)
@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one request is decoded.

    Args:
        temperature: 0 is greedy. Otherwise logits are divided by it.
        top_p: keep the most likely tokens whose probabilities sum to this much.
        top_k: keep the k most likely tokens (all that tie with the k-th); 0 or -1 keeps all.
        min_p: keep tokens at least this likely, relative to the likeliest.
        repetition_penalty: divides positive and multiplies negative logits of tokens in the
            prompt or the answer; above 1 discourages them.
        presence_penalty: subtracted from the logits of tokens in the answer.
        frequency_penalty: subtracted once for each time a token is in the answer.
        seed: makes the request's answer its own, whatever is decoded beside it; None takes
            the next of `LLM`'s.
        max_tokens: most tokens to generate; None generates until the context is full.
        min_tokens: no stop id, end id or stop string ends the answer before so many tokens.
        stop: strings that end the answer; the text stops before them.
        stop_token_ids: ids that end the answer, the model's own end ids aside; kept in the ids.
        bad_words: words that the answer may not contain.
        ignore_eos: the model's own end ids do not end the answer.
        skip_special_tokens: leave special tokens out of the text.

    The order is vLLM's: bad words and ``min_tokens``, penalties, temperature, min_p, top_k, top_p.

    Raises:
        RequestError: for a value that cannot be, and for a field that does not exist here.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Iterable[str] | None = ()
    stop_token_ids: Iterable[int] | None = ()
    bad_words: Iterable[str] | None = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        for name in ("stop", "bad_words", "stop_token_ids"):
            given = getattr(self, name)
            if isinstance(given, str):
                given = (given,)
            if given is not None and (isinstance(given, Mapping) or not isinstance(given, Iterable)):
                raise RequestError(f"{name} must be a list, found {given!r:.60}")
            object.__setattr__(self, name, tuple(given or ()))
        self._number("temperature", lambda x: x >= 0, "at least 0")
        self._number("top_p", lambda x: 0 < x <= 1, "above 0 and at most 1")
        self._number("min_p", lambda x: 0 <= x <= 1, "from 0 to 1")
        self._number("repetition_penalty", lambda x: 1e-6 <= x <= 1e6, "above 0 (from 1e-6 to 1e6)")
        for name in ("presence_penalty", "frequency_penalty"):
            self._number(name, lambda x: -2 <= x <= 2, "from -2 to 2")
        self._integer("top_k", lambda x: x >= -1, "0 or -1 (all tokens) or at least 1")
        self._integer("max_tokens", lambda x: x >= 1, "None or an integer of at least 1", optional=True)
        self._integer("min_tokens", lambda x: x >= 0, "an integer of at least 0")
        self._integer(
            "seed", lambda x: 0 <= x < 2**64, "None or an integer from 0 to 2**64 - 1", optional=True
        )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}")
        if not all(_is_int(i) and i >= 0 for i in self.stop_token_ids or ()):
            raise RequestError(f"stop_token_ids must be token ids, found {self.stop_token_ids!r:.60}")
        for name in ("stop", "bad_words"):
            given = getattr(self, name)
            if not all(
                isinstance(word, str) and (word if name == "stop" else word.strip()) for word in given
            ):
                raise RequestError(f"{name} must hold texts that are not empty, found {given!r:.60}")
            if any(not_unicode(word) is not None for word in given):
                raise RequestError(f"{name} must hold valid Unicode, found {given!r:.60}")
        for name in ("ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be True or False, found {getattr(self, name)!r:.60}")

    def _number(self, name: str, holds: Callable[[float], bool], wanted: str) -> None:
        value = getattr(self, name)
        if not _is_finite(value) or not holds(value):
            raise RequestError(f"{name} must be {wanted}, found {value!r:.60}")

    def _integer(self, name: str, holds: Callable[[int], bool], wanted: str, optional: bool = False) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        if not isinstance(value, int) or isinstance(value, bool) or not holds(value):
            raise RequestError(f"{name} must be {wanted}, found {value!r:.60}")

    @property
    def is_greedy(self) -> bool:
        """The likeliest token is taken each time."""
        return self.temperature < GREEDY_BELOW

    @property
    def is_plain(self) -> bool:
        """The answer is the argmax of the target's own logits, untouched."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        untouched = penalties == (1, 0, 0) and not self.bad_words and self.min_tokens == 0
        return self.is_greedy and untouched

    def end_ids(self, eos_ids: tuple[int, ...]) -> tuple[int, ...]:
        """All ids that end this request. Raises RequestError when the device rows cannot hold them."""
        own = tuple(self.stop_token_ids or ())
        ids = tuple(dict.fromkeys((() if self.ignore_eos else eos_ids) + own))
        if len(ids) > MAX_STOP_IDS:
            raise RequestError(f"{len(ids)} stop ids (the model's own included), at most {MAX_STOP_IDS} work")
        return ids


def _is_neutral(name: str, value: object) -> bool:
    """Whether an argument that does not exist here asks for nothing; True is no 1."""
    neutral = NEUTRAL.get(name, ())
    return value is None or (isinstance(value, bool) == isinstance(neutral, bool) and value == neutral)


def _is_finite(value: object) -> bool:
    """Whether it is a number that a float can hold."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
