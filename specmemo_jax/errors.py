"""Errors a user can act on: what was asked, what was found, what would work."""


class SpecMemoError(Exception):
    """Base of every error this package raises on purpose; the CLI prints it as one line."""


class ConfigError(SpecMemoError, ValueError):
    """A model configuration that is malformed or asks for what is not supported."""


class WeightsError(SpecMemoError, ValueError):
    """A checkpoint that is missing, truncated, of the wrong shape, or not finite."""


class ModelNotFoundError(SpecMemoError, LookupError):
    """No model of that name in the zoo, on disk, or on the hub."""


class DownloadError(SpecMemoError, OSError):
    """A file could not be fetched or did not match its pinned hash."""


class RequestError(SpecMemoError, ValueError):
    """A prompt or sampling parameter that cannot be served."""


class ClosedError(RequestError):
    """A model that was closed."""

    def __init__(self, message: str = "the model was closed; a new LLM(...) works"):
        super().__init__(message)


class ForkError(SpecMemoError, RuntimeError):
    """A model that was made before the process forked."""


class SpecMemoWarning(UserWarning):
    """Base of every note this package gives about something that went otherwise than asked."""


class CheckpointWarning(SpecMemoWarning):
    """A checkpoint whose parts contradict each other: what was made of it."""


class CacheWarning(SpecMemoWarning):
    """Something that would be kept for the next start cannot be."""


class DrafterWarning(SpecMemoWarning):
    """A trained head whose guesses are not accepted: made for another target, most likely."""


class CapacityWarning(SpecMemoWarning):
    """The device had less memory than planned: what was given up so that generation could go on."""


class CapacityError(SpecMemoError, ValueError):
    """A request that needs more context or memory than the plan holds."""


class BudgetError(CapacityError):
    """A memory budget under which no plan exists; says the least that would work, in bytes."""

    def __init__(self, message: str, *, least_budget: int, least_speculative_budget: int | None = None):
        super().__init__(message)
        self.least_budget, self.least_speculative_budget = least_budget, least_speculative_budget
