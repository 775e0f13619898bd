"""What goes into a request and what comes out; names and meanings as in vLLM."""

import dataclasses

from specmemo_jax.errors import RequestError
from specmemo_jax.memory.plan import MAX_STOP_IDS


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How one request is decoded. Decoding is greedy: ``temperature`` must be 0.

    ``max_tokens``: most tokens to generate; None generates until the context is full.
    ``stop_token_ids``: end the answer, the model's own end ids aside; kept in the output.
    ``ignore_eos``: the model's own end ids do not end it.
    """

    temperature: float = 0.0
    max_tokens: int | None = 16
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.temperature != 0:
            raise RequestError(
                f"temperature={self.temperature!r}: only greedy decoding (temperature=0) is available"
            )
        if self.max_tokens is not None and (not _is_int(self.max_tokens) or self.max_tokens < 1):
            raise RequestError(
                f"max_tokens must be None or an integer of at least 1, found {self.max_tokens!r}"
            )
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        if not all(_is_int(i) and i >= 0 for i in self.stop_token_ids):
            raise RequestError(f"stop_token_ids must be token ids, found {self.stop_token_ids!r}")

    def stops(self, eos_ids: tuple[int, ...]) -> tuple[int, ...]:
        """All ids that end this request. Raises RequestError when the device rows cannot hold them."""
        ids = tuple(dict.fromkeys((() if self.ignore_eos else eos_ids) + self.stop_token_ids))
        if len(ids) > MAX_STOP_IDS:
            raise RequestError(f"{len(ids)} stop ids (the model's own included), at most {MAX_STOP_IDS} work")
        return ids


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class CompletionOutput:
    """One answer. ``finish_reason``: ``"stop"`` (a stop id, last in ``token_ids``) or ``"length"``."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str


@dataclasses.dataclass(frozen=True)
class RequestMetrics:
    """Counts and wall-clock seconds of one request.

    ``steps``: target passes after prefill. ``accepted_lengths``: tokens each of them
    emitted (bonus token counted; all 1 in plain decoding). ``decode_s`` runs from the
    first token to the end and is shared with the rows decoded beside this one.
    """

    steps: int
    accepted_lengths: tuple[int, ...]
    time_to_first_token_s: float
    decode_s: float

    @property
    def mean_accepted_length(self) -> float:
        """Tokens a target pass; 1.0 without any pass."""
        return sum(self.accepted_lengths) / self.steps if self.steps else 1.0

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed: tokens after the first over ``decode_s``; 0.0 when there were none."""
        return sum(self.accepted_lengths) / self.decode_s if self.decode_s > 0 else 0.0


@dataclasses.dataclass(frozen=True)
class RequestOutput:
    """A finished request, in the order the prompts were given."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    metrics: RequestMetrics
    finished: bool = True
