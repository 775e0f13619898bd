"""One training run from names to files: data, a start, the loop, and the head as others read it."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specmemo_jax.checkpoints.open import OpenModel, open_model
from specmemo_jax.devices.quiet import live_devices
from specmemo_jax.draft.head_config import HeadConfig, HeadKind
from specmemo_jax.errors import ConfigError, RequestError
from specmemo_jax.files.json_files import write_json
from specmemo_jax.train import data, start
from specmemo_jax.train.checkpoints import Checkpoints
from specmemo_jax.train.export import write_head
from specmemo_jax.train.judge import LossKind
from specmemo_jax.train.loop import Report, Schedule, State, Trainer
from specmemo_jax.train.loss import Objective, Rows, Vocabulary
from specmemo_jax.train.sample import Sampler
from specmemo_jax.train.synthesize import synthesize
from specmemo_jax.train.target import TargetWeights, load_target

DATA, RUN, LOG = "data.npz", "run.json", "log.jsonl"
# EAGLE's own weights of its two losses (arXiv 2401.15077, section 3.2).
EAGLE_WEIGHTS = (1.0, 0.1)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is trained on what. None leaves a choice to the device, or to the kind of head.

    ``synthesize``: conversations that the target makes up where ``data`` is None, ``sample_batch`` at once.
    ``steps``: unrolled steps (Medusa: heads). ``draft_vocab``: tokens that the head can propose, 0 for all.
    ``own_lm_head``: it learns the rows that score them, instead of using the target's.
    """

    method: HeadKind
    target: str
    data: str | None = None
    synthesize: int = 2_000
    answer_tokens: int = 256
    temperature: float = 0.7
    greedy_share: float = 0.5
    sample_batch: int | None = None
    length: int = 512
    steps: int = 6
    loss: LossKind = "kl"
    rate: float = 1e-3
    draft_vocab: int = 8192
    own_lm_head: bool = False
    taps: tuple[int, ...] | None = None
    max_steps: int | None = None
    minutes: float | None = None
    rows: int | None = None
    dtype: str = "auto"
    seed: int = 0
    save_every: float = 60.0
    report_every: float = 20.0

    def __post_init__(self) -> None:
        if self.max_steps is None and self.minutes is None:
            raise ConfigError("nothing ends the training; max_steps or minutes would work")
        if self.loss not in ("kl", "lk"):
            raise ConfigError(f"loss {self.loss!r} is not one of kl, lk")


def train_head(settings: Settings, out: Path, say: Callable[[str], None] = lambda text: None) -> Report:
    """Train a head into ``out``: model.safetensors, config.json, log.jsonl, curve.png where matplotlib is.

    A run in the same folder with the same settings goes on where it was. Raises SpecMemoError.
    """
    out.mkdir(parents=True, exist_ok=True)
    _check_folder(out, settings)
    on_cpu = live_devices()[0].platform == "cpu"
    dtype = jnp.dtype(("float32" if on_cpu else "bfloat16") if settings.dtype == "auto" else settings.dtype)
    opened = open_model(settings.target)
    if settings.length > opened.config.max_context:
        raise ConfigError(
            f"rows of {settings.length} tokens for a target with a context of {opened.config.max_context}; "
            "that many or fewer (--length) would work"
        )
    head = start.head_config(
        settings.method,
        opened.config,
        draft_vocab=settings.draft_vocab or None,
        taps=settings.taps,
        heads=settings.steps,
        own_lm_head=settings.own_lm_head,
    )
    eos = opened.generation_defaults.eos_token_ids
    if not eos and opened.tokenizer is not None:
        eos = tuple(opened.tokenizer.eos_token_ids)
    given = _given(settings, opened, eos)
    write_json(out / RUN, _plain(settings))
    weights = load_target(opened, dtype)
    found = given or _made(settings, out, opened, weights, eos, 32 if on_cpu else 512, say)
    train, held = _rows(found, settings.length, say)
    answers = train.tokens[train.answers]
    ids = start.draft_ids(answers, head.draft_vocab_size, opened.config.vocab_size, eos)
    covered = float(np.isin(held.tokens[held.answers], ids).mean()) if held.answers.any() else 1.0
    say(f"draft vocabulary: {len(ids)} tokens, {covered:.1%} of the held-out answers")
    feature, token = EAGLE_WEIGHTS if settings.method == "eagle" else (0.0, 1.0)
    objective = Objective(settings.steps, settings.loss, dtype, feature, token)
    schedule = Schedule(
        rate=settings.rate,
        steps=settings.max_steps,
        minutes=settings.minutes,
        batch=settings.rows or (4 if on_cpu else 32),
        burst=1 if on_cpu else 10,
        seed=settings.seed,
        save_every=settings.save_every,
        report_every=settings.report_every,
    )
    most = 4 * schedule.batch if on_cpu else 2 * schedule.batch
    trainer = Trainer(
        opened.config,
        weights,
        head,
        objective,
        schedule,
        _vocabulary(ids, opened.config.vocab_size),
        _on_device(train),
        jax.tree.map(lambda x: x[:most], _on_device(held)),
    )
    params = start.start_params(head, opened.config, weights, ids, settings.seed)

    def note(report: Report, state: State) -> None:
        say(str(report))
        with (out / LOG).open("a", encoding="utf-8") as log:
            log.write(json.dumps(dataclasses.asdict(report)) + "\n")
        _export(out, head, state, ids, opened, settings, report)

    _, report = trainer.run(trainer.fresh(params), Checkpoints(out / "checkpoints"), note)
    _draw(out)
    return report


def _plain(settings: Settings) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def _check_folder(out: Path, settings: Settings) -> None:
    """Refuse a folder with something else in it: a model, or a run of other settings. How long it goes on and
    how often it saves and reports, may change.
    """
    file = out / RUN
    if not file.exists():
        held = [path.name for path in (out / "config.json", *out.glob("*.safetensors")) if path.exists()]
        if held:
            raise ConfigError(f"{out} holds {held[0]}, and no run of training; another folder would work")
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"{file} does not say what the run is; another folder would work")
    asked, free = _plain(settings), ("minutes", "save_every", "report_every", "sample_batch")
    other = [name for name in asked if name not in free and found.get(name) != asked[name]]
    if other:
        raise ConfigError(
            f"{out} holds a run with {other[0]}={found.get(other[0])!r}, asked is "
            f"{asked[other[0]]!r}; the same settings, or another folder, would work"
        )


def _given(settings: Settings, opened: OpenModel, eos: tuple[int, ...]) -> list[data.Conversation] | None:
    """The conversations of a file that was named."""
    if settings.data is None:
        return None
    path, size = Path(settings.data), opened.config.vocab_size
    if not path.is_file():
        raise RequestError(f"no file {path}; one of conversations (.jsonl, .npz), or none, would work")
    found = data.read_file(path, opened.tokenizer, eos)
    most = max((int(np.max(c.ids, initial=0)) for c in found), default=-1)
    if not 0 <= most < size:
        what = "no conversation" if most < 0 else f"token {most}, the target has {size}"
        raise RequestError(f"{path} holds {what}; conversations with this target would work")
    return found


def _made(
    settings: Settings,
    out: Path,
    opened: OpenModel,
    weights: TargetWeights,
    eos: tuple[int, ...],
    batch: int,
    say: Callable[[str], None],
) -> list[data.Conversation]:
    """Conversations that the target makes up: kept from an earlier start, or made now and kept."""
    if (out / DATA).exists():
        return data.load_tokens(out / DATA)
    if opened.tokenizer is None:
        raise RequestError(f"{opened.no_tokenizer}; --data FILE.npz would work")
    sampler = Sampler(
        opened.config,
        weights,
        eos,
        settings.sample_batch or batch,
        lambda done, ids: say(f"sampled {done} texts, {ids:,} tokens"),
    )
    found = synthesize(
        sampler,
        opened.tokenizer,
        eos,
        count=settings.synthesize,
        answer_tokens=settings.answer_tokens,
        seed=settings.seed,
        temperature=settings.temperature,
        greedy_share=settings.greedy_share,
    )
    if not found:
        raise RequestError(
            f"no conversation came of {settings.synthesize} questions; more of them would work"
        )
    data.save_tokens(out / DATA, found)
    return found


def _rows(
    found: list[data.Conversation], length: int, say: Callable[[str], None]
) -> tuple[data.PackedRows, data.PackedRows]:
    """Rows to train on, and those held out."""
    groups = [c for c in found if not data.is_held_out(c)], [c for c in found if data.is_held_out(c)]
    packed = []
    for name, group in zip(("training", "held out"), groups, strict=True):
        rows, cut = data.pack_rows(group, length)
        packed.append(rows)
        answers = int(np.count_nonzero(rows.answers))
        say(f"{name}: {len(group)} conversations, {answers:,} answer tokens, {len(rows.tokens)} rows; {cut}")
    if not len(packed[0].tokens):
        raise RequestError("no conversation to train on; more of them would work")
    return packed[0], packed[1]


def _on_device(rows: data.PackedRows) -> Rows:
    return Rows(jnp.asarray(rows.tokens), jnp.asarray(rows.segments), jnp.asarray(rows.answers))


def _vocabulary(ids: np.ndarray, size: int) -> Vocabulary:
    places = np.full(size, -1, np.int32)
    places[ids] = np.arange(len(ids))
    return Vocabulary(jnp.asarray(ids), jnp.asarray(places))


def _export(
    out: Path,
    head: HeadConfig,
    state: State,
    ids: np.ndarray,
    opened: OpenModel,
    settings: Settings,
    report: Report,
) -> None:
    training: dict[str, Any] = {
        **dataclasses.asdict(settings),
        "steps_done": report.step,
        "tokens": report.tokens,
        "seconds": round(report.seconds, 1),
        "acceptance": [round(x, 4) for x in report.acceptance],
        "accepted_length": round(report.accepted_length, 3),
    }
    training["data"] = None if settings.data is None else Path(settings.data).name
    write_head(out, head, state.params, ids, target_name=opened.name, target=opened.config, training=training)


def _draw(out: Path) -> None:
    """curve.png: held-out acceptance by depth over tokens, where matplotlib is."""
    try:
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ImportError:
        return
    lines = [json.loads(line) for line in (out / LOG).read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line["acceptance"]]
    if not lines:
        return
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for depth in range(len(lines[0]["acceptance"])):
        axes.plot(
            [line["tokens"] / 1e6 for line in lines],
            [line["acceptance"][depth] for line in lines],
            label=f"depth {depth + 1}",
        )
    axes.set(xlabel="tokens read, millions", ylabel="held-out acceptance, former tokens right", ylim=(0, 1))
    axes.legend(frameon=False)
    figure.savefig(out / "curve.png", dpi=150)
