"""What the shell offers for the names of models and drafters."""

from collections.abc import Iterator

# self:K is left out: bash splits words at a colon, zsh ends them there.
_DRAFTERS = (
    ("auto", "what suits the model"),
    ("ngram", "repeats of the text so far"),
    ("none", "plain decoding"),
)


def complete_model(incomplete: str) -> list[tuple[str, str]]:
    """Models that can run: the zoo's with weights, and those in the hub's cache."""
    return [choice for choice in _models() if choice[0].startswith(incomplete)]


def complete_drafter(incomplete: str) -> list[tuple[str, str]]:
    """The drafters by name, then the models."""
    return [choice for choice in (*_DRAFTERS, *_models()) if choice[0].startswith(incomplete)]


def complete_pull(incomplete: str) -> list[tuple[str, str]]:
    """Models that can be fetched by the zoo's name."""
    return [choice for choice in _zoo() if choice[0].startswith(incomplete)]


def _zoo() -> Iterator[tuple[str, str]]:
    from specmemo_jax.checkpoints import zoo_names

    return ((entry.name, entry.summary) for entry in zoo_names() if not entry.config_only)


def _models() -> Iterator[tuple[str, str]]:
    from specmemo_jax.cli.inventory import hub_folders

    yield from _zoo()
    yield from ((hub_id, "in the hub's cache") for hub_id, _ in hub_folders())
