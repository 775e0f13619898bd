"""`specmemo calibrate`: what was measured here, for the planner: times, and acceptance on prompts."""

import contextlib
import dataclasses
import datetime
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax.numpy as jnp

from specmemo_jax.checkpoints.open import OpenModel, open_model
from specmemo_jax.decode.rows import MAX_STOP_IDS
from specmemo_jax.devices.quiet import live_devices
from specmemo_jax.devices.table import default_dtype, live_device
from specmemo_jax.draft import (
    Drafter,
    NgramDrafter,
    TreeShape,
    is_model_name,
    make_drafter,
)
from specmemo_jax.draft.load import open_drafter
from specmemo_jax.engine.engine import Engine
from specmemo_jax.engine.request import Request
from specmemo_jax.errors import ConfigError, RequestError
from specmemo_jax.files.prompts import PromptRecord, read_prompts
from specmemo_jax.llama.kv import SLOTS
from specmemo_jax.llama.packing import Target, pack
from specmemo_jax.measure.acceptance import Answer, Proposal, measure_ngram, profile_of_steps, recorded
from specmemo_jax.measure.timing import Grid, StepProgress, measure
from specmemo_jax.memory.plan import lay_out
from specmemo_jax.memory.shapes import Shapes
from specmemo_jax.planning.cache_effect import KV_DTYPE, NAME, CacheEffect
from specmemo_jax.planning.calibration import Calibration, Fingerprint
from specmemo_jax.planning.profile import AcceptanceProfile, profile_file, user_folder
from specmemo_jax.planning.request import fingerprint_on

NGRAM_NODES, NGRAM_BRANCHES = 16, 3  # whose steps an n-gram profile's chances are counted at
HEAD_TREE = TreeShape(32, 6, 6)  # a head's: deep and wide enough to tell the chances of smaller trees


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is measured: a model as opened and on the device, and a drafter for it."""

    opened: OpenModel
    target: Target
    drafter: Drafter | None

    @property
    def fingerprint(self) -> Fingerprint:
        """Of this device, model, dtype and the installed versions."""
        return fingerprint_on(
            live_device(live_devices()[0]), self.opened.name, self.opened.config, self.target.dtype.name
        )


def open_setup(
    model: str | Path, dtype: str = "auto", drafter: str | None = "auto", tree_nodes: int | None = None
) -> Setup:
    """Load what `LLM` would load for these names. Raises as it does."""
    opened, device = open_model(model), live_devices()[0]
    chosen = jnp.dtype(default_dtype(device) if dtype == "auto" else dtype)
    if is_model_name(drafter):
        found = open_drafter(drafter, opened, tree_nodes, chosen, device.platform, head_tree=HEAD_TREE)
    else:
        found = make_drafter(drafter, tree_nodes, platform=device.platform, dtype=chosen.name)
    return Setup(opened, pack(opened.config, opened.tensors(), chosen, device), found)


def calibrate(setup: Setup, grid: Grid | None = None, progress: StepProgress = lambda _: None) -> Calibration:
    """Time ``setup`` on this device (see `specmemo_jax.measure.timing`); `Calibration.save` keeps it."""
    return measure(setup.target, setup.drafter, setup.fingerprint, grid or Grid(), progress)


def profile_path(setup: Setup) -> Path:
    """Where a user's own profile of this subject is kept."""
    return profile_file(user_folder(setup.opened.name), _drafter(setup).name)


def profile(
    setup: Setup,
    prompts: str | Path,
    *,
    max_tokens: int = 128,
    limit: int | None = None,
    progress: Callable[[], object] = lambda: None,
) -> AcceptanceProfile:
    """The acceptance of ``setup``'s drafter on a JSONL file of prompts, answered greedily.

    Lines are prompts as ``specmemo generate`` takes them, or answers that are known:
    ``{"prompt_ids": [...], "new_ids": [...]}``, which an n-gram drafter is replayed over without running
    the target. Raises RequestError for a line that is neither or does not fit the context.
    """
    drafter, known = _drafter(setup), read_answers(prompts)
    labels = {
        "drafter": drafter.name,
        "model": setup.opened.name,
        "dtype": setup.target.dtype.name,
        "prompts": Path(prompts).name,
        "date": datetime.date.today().isoformat(),
    }
    ngram = isinstance(drafter, NgramDrafter)
    if known is not None and ngram:
        answers = known[:limit]
    else:
        runs = _run(setup, drafter, prompts, known, max_tokens, limit)
        answers, proposals = [], []
        for answer, steps in runs:
            answers.append(answer)
            proposals += steps
            progress()
        if not ngram:
            return profile_of_steps(drafter, proposals, labels)
    return measure_ngram(NgramDrafter(NGRAM_NODES, NGRAM_BRANCHES), answers, labels)


def effect_path(setup: Setup) -> Path:
    """Where a user's own measurement of an int8 cache is kept."""
    return profile_file(user_folder(setup.opened.name), NAME)


def measure_cache(
    setup: Setup,
    prompts: str | Path,
    *,
    max_tokens: int = 128,
    limit: int | None = None,
    progress: Callable[[], object] = lambda: None,
) -> CacheEffect:
    """What an int8 cache changes of ``setup``'s greedy answers to a JSONL file of prompts (see `profile`).

    Every next token of every answer is asked for with both caches, after the same text; then each cache
    writes the answer on its own.
    """
    known = read_answers(prompts)
    if known is None:
        answers = [answer for answer, _ in _run(setup, _drafter(setup), prompts, None, max_tokens, limit)]
    else:
        answers = known[:limit]
    config, target, dtype = setup.opened.config, setup.target, setup.target.dtype.name
    longest = min(config.max_context, -(-max(len(answer.ids) for answer in answers) // SLOTS) * SLOTS)
    tokens = same = same_answers = 0
    with contextlib.ExitStack() as stack:
        exact, lossy = (
            stack.enter_context(
                contextlib.closing(
                    Engine(
                        target,
                        lay_out(Shapes(config, dtype, target.platform, longest, kv_dtype=kv_dtype)),
                    )
                )
            )
            for kv_dtype in (None, KV_DTYPE)
        )
        for answer in answers:
            pairs = list(zip(_next_tokens(exact, answer), _next_tokens(lossy, answer), strict=True))
            tokens, same = tokens + len(pairs), same + sum(a == b for a, b in pairs)
            same_answers += _greedy(exact, answer) == _greedy(lossy, answer)
            progress()
    return CacheEffect(
        model=setup.opened.name,
        dtype=target.dtype.name,
        prompts=Path(prompts).name,
        date=datetime.date.today().isoformat(),
        tokens=tokens,
        same=same,
        answers=len(answers),
        same_answers=same_answers,
    )


def _next_tokens(engine: Engine, answer: Answer) -> list[int]:
    """The likeliest token at each place of an answer, after the answer's own text."""
    found = []
    for end in range(len(answer.prompt), len(answer.ids)):
        found.append(engine.admit(0, Request(answer.ids[:end], 1, reuse=True)))
        engine.release(0)
    return found


def _greedy(engine: Engine, answer: Answer) -> list[int]:
    """As many tokens as the answer has, each after the one before."""
    engine.admit(0, Request(answer.prompt, len(answer.new)))
    while True:
        log = engine.rows[0]
        assert log is not None
        if log.finished:
            return engine.release(0).new_ids
        engine.burst()


def check_prompts(prompts: str | Path) -> None:
    """Raise RequestError for a prompts file that `profile` cannot read."""
    if read_answers(prompts) is None:
        read_prompts(prompts)


def read_answers(path: str | Path) -> list[Answer] | None:
    """Known answers of a JSONL file; None where its first line is a prompt. Raises RequestError for a line
    that differs from the first, or a file that cannot be read.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise RequestError(f"cannot read prompts from {path}: {error}; a JSONL file works") from error
    if not rows or not isinstance(rows[0], dict) or "prompt_ids" not in rows[0]:
        return None
    answers = []
    for number, row in enumerate(rows, 1):
        lists = [row.get(key) if isinstance(row, dict) else None for key in ("prompt_ids", "new_ids")]
        for ids in lists:
            if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
                raise RequestError(
                    f'{path}, record {number}: "prompt_ids" and "new_ids" must be lists of token ids'
                )
        answers.append(Answer(*map(tuple, lists)))  # type: ignore[arg-type]
    return answers


def _run(
    setup: Setup,
    drafter: Drafter,
    prompts: str | Path,
    known: Sequence[Answer] | None,
    max_tokens: int,
    limit: int | None,
) -> Iterator[tuple[Answer, list[Proposal]]]:
    """Answer every turn of every prompt through the recording step."""
    config, target = setup.opened.config, setup.target
    shapes = Shapes(config, target.dtype.name, target.platform, config.max_context, drafter=drafter)
    engine = Engine(target, lay_out(shapes))
    stop = setup.opened.generation_defaults.eos_token_ids or config.eos_token_ids
    stop = stop[:MAX_STOP_IDS]

    def answer(ids: Sequence[int], tokens: int, place: str) -> tuple[Answer, list[Proposal]]:
        if len(ids) + tokens > shapes.context:
            raise RequestError(
                f"{place}: {len(ids)} tokens and {tokens} new ones, the context holds {shapes.context}"
            )
        found, steps = recorded(engine, Request(ids, tokens, stop))
        return Answer(tuple(ids), tuple(found)), steps

    with contextlib.closing(engine):
        if known is not None:
            for number, one in enumerate(known[:limit], 1):
                yield answer(one.prompt, len(one.new), f"{prompts}, record {number}")
            return
        for record in read_prompts(prompts)[:limit]:
            ask = functools.partial(answer, tokens=max_tokens, place=record.place)
            yield from _conversation(setup.opened, record, ask)


def _conversation(
    opened: OpenModel, record: PromptRecord, answer: Callable[[Sequence[int]], tuple[Answer, list[Proposal]]]
) -> Iterator[tuple[Answer, list[Proposal]]]:
    """The turns of one record, each asked after the one before was answered."""
    if record.token_ids is not None:
        yield answer(record.token_ids)
        return
    tokenizer = opened.tokenizer
    if tokenizer is None:
        raise RequestError(f"{record.place}: {opened.no_tokenizer}, which texts need; token ids would work")
    if record.messages is None:
        assert record.text is not None
        yield answer(tokenizer.encode(record.text))
        return
    messages = list(record.messages)
    for later in (*record.later_turns, None):
        found, steps = answer(tokenizer.chat_ids(messages))
        yield found, steps
        if later is not None:
            text = tokenizer.decode(list(found.new))
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": later}]


def _drafter(setup: Setup) -> Drafter:
    if setup.drafter is None:
        raise ConfigError("an acceptance profile needs a drafter, found none; ngram or self:K would work")
    return setup.drafter
