"""What a plan is made for."""

import dataclasses

from specmemo_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Workload:
    """``batch`` rows decoded together, each of ``prompt_tokens`` read and ``new_tokens`` written.

    ``context``: most tokens a row may ever hold, prompt and answer; None takes the largest
    that fits, at least both together.
    """

    batch: int = 1
    prompt_tokens: int = 512
    new_tokens: int = 128
    context: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "prompt_tokens", "new_tokens"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, found {value}")
        if self.context is not None and self.context < 1:
            raise ConfigError(f"context must be at least 1, found {self.context}")
        if self.context is not None and self.context < self.tokens:
            raise ConfigError(
                f"context {self.context} holds less than {self.prompt_tokens} prompt tokens and "
                f"{self.new_tokens} new ones ({self.tokens}); a larger context or fewer tokens would work"
            )

    @property
    def tokens(self) -> int:
        """Tokens of one row at its end."""
        return self.prompt_tokens + self.new_tokens
