"""What comes out of a request; names and meanings as in vLLM."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class CompletionOutput:
    """One answer.

    ``finish_reason``: ``"stop"`` (an end id, last in ``token_ids``, or a stop string, from which on
    ``text`` is cut), ``"length"``, or ``"abort"`` where it was left early. ``stop_reason``: the
    stop string or the id of ``stop_token_ids`` that ended it; None otherwise.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    stop_reason: str | int | None = None


@dataclasses.dataclass(frozen=True)
class RequestMetrics:
    """Counts and wall-clock seconds of one request.

    ``steps``: target passes after prefill. ``accepted_lengths``: tokens each of them
    emitted (bonus token counted; all 1 in plain decoding). ``tree_nodes``: the size of tree each
    verified, 1 where an adaptive run decoded plainly. ``decode_s`` runs from the
    first token to the end and is shared with the rows decoded beside this one.
    """

    steps: int
    accepted_lengths: tuple[int, ...]
    time_to_first_token_s: float
    decode_s: float
    tree_nodes: tuple[int, ...] = ()

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
    """A request's outcome. ``finished``: it ended by itself and was not left early."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    metrics: RequestMetrics
    finished: bool = True
