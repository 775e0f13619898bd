"""What `specmemo calibrate` measured on a device, kept under a fingerprint of what it holds for."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path

from specmemo_jax.errors import ConfigError
from specmemo_jax.files.cache_dir import cache_dir
from specmemo_jax.files.json_files import Reader, file_name, write_json
from specmemo_jax.llama.buffers import Cost
from specmemo_jax.llama.config import LlamaConfig

FORMAT = 1
_PACKAGES = ("jax", "jaxlib", "specmemo-jax")


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What measured times hold for: a device by its name, a model, a dtype, and versions by package."""

    device: str
    model: str
    config_hash: str
    dtype: str
    versions: Mapping[str, str]

    @property
    def path(self) -> Path:
        """The file of these measurements in the user's cache."""
        content = json.dumps(dataclasses.asdict(self), sort_keys=True)
        digest = hashlib.sha256(content.encode()).hexdigest()[:12]
        return cache_dir() / "calibration" / f"{file_name(self.model)}-{self.dtype}-{digest}.json"

    def differences(self, other: "Fingerprint") -> str:
        """Where ``other`` differs, for a message; empty where it does not."""
        found = []
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine != theirs:
                found.append(f"{field.name} {theirs!r}, not {mine!r}")
        return ", ".join(found)


@dataclasses.dataclass(frozen=True)
class StepPoint:
    """Seconds of a step without drafting: ``batch`` rows, ``nodes`` each, ``capacity`` slots a row."""

    batch: int
    nodes: int
    capacity: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class PrefillPoint:
    """Seconds of one prompt chunk at ``capacity`` slots."""

    chunk: int
    capacity: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class DraftPoint:
    """Seconds of one row's drafting in a step, and the `Cost` that the drafter says it is."""

    drafter: str
    nodes: int
    capacity: int
    work: Cost
    seconds: float


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Measured points and rates: ``bandwidth`` in bytes/s, ``flops`` in FLOP/s of the fingerprint's dtype.

    ``smallest_roof_seconds``: a roofline's time, at those rates, of the smallest step measured.
    """

    fingerprint: Fingerprint
    date: str
    num_layers: int
    bandwidth: float
    flops: float
    smallest_roof_seconds: float
    steps: tuple[StepPoint, ...]
    prefills: tuple[PrefillPoint, ...]
    drafts: tuple[DraftPoint, ...] = ()

    def __post_init__(self) -> None:
        if not self.prefills or not any(p.batch == 1 for p in self.steps):
            raise ConfigError(
                f"calibration of {self.fingerprint.model}: needs steps of one row and prompt chunks, found "
                f"{len(self.steps)} steps and {len(self.prefills)} chunks; `specmemo calibrate` measures both"
            )

    @property
    def base_capacity(self) -> int:
        """The capacity at which one row was measured with the most numbers of nodes; the least of those."""
        single = [p for p in self.steps if p.batch == 1]
        sizes = {p.capacity: sum(q.capacity == p.capacity for q in single) for p in single}
        return min(sizes, key=lambda capacity: (-sizes[capacity], capacity))

    def save(self, path: Path | None = None) -> Path:
        """Write it, whole or not at all, to ``path`` or its place in the user's cache; where is returned."""
        path = self.fingerprint.path if path is None else path
        write_json(path, {"format": FORMAT, **dataclasses.asdict(self)})
        return path

    @classmethod
    def load(cls, path: Path, expected: Fingerprint | None = None) -> "Calibration":
        """Read what `save` wrote. Raises ConfigError for a broken file, and for one that was measured
        with another device, model, dtype or version than ``expected``.
        """
        reader = Reader.of_file(path, "a calibration (`specmemo calibrate` writes one)")
        reader.expect("format", FORMAT)
        found = _read_fingerprint(reader.part("fingerprint"))
        if expected is not None and found != expected:
            raise ConfigError(
                f"{path} was measured with {expected.differences(found)}; `specmemo calibrate` would work"
            )
        return cls(
            fingerprint=found,
            date=reader.text("date"),
            num_layers=max(1, reader.whole("num_layers")),
            bandwidth=reader.positive("bandwidth"),
            flops=reader.positive("flops"),
            smallest_roof_seconds=reader.positive("smallest_roof_seconds"),
            steps=tuple(
                StepPoint(p.count("batch"), p.count("nodes"), p.count("capacity"), p.positive("seconds"))
                for p in reader.items("steps")
            ),
            prefills=tuple(
                PrefillPoint(p.count("chunk"), p.count("capacity"), p.positive("seconds"))
                for p in reader.items("prefills")
            ),
            drafts=tuple(map(_read_draft, reader.items("drafts"))),
        )


def fingerprint(device: str, model: str, config: LlamaConfig, dtype: str) -> Fingerprint:
    """Of a device by its kind (``jax.devices()[0].device_kind``), a model and the installed versions."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return Fingerprint(device, model, config_hash(config), dtype, versions)


@functools.lru_cache(maxsize=64)
def config_hash(config: LlamaConfig) -> str:
    """A short hash of everything in a config."""
    content = json.dumps(dataclasses.asdict(config), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


def find_calibration(wanted: Fingerprint) -> Calibration | None:
    """What was measured under this fingerprint, or None. Raises ConfigError for a broken file."""
    return Calibration.load(wanted.path, wanted) if wanted.path.is_file() else None


def _read_fingerprint(reader: Reader) -> Fingerprint:
    versions = reader.part("versions")
    return Fingerprint(
        **{name: reader.text(name) for name in ("device", "model", "config_hash", "dtype")},
        versions={name: versions.text(name) for name in versions.fields},
    )


def _read_draft(reader: Reader) -> DraftPoint:
    work = reader.part("work")
    return DraftPoint(
        drafter=reader.text("drafter"),
        nodes=reader.count("nodes"),
        capacity=reader.count("capacity"),
        work=Cost(work.whole("layers"), work.amount("flops"), work.amount("bytes")),
        seconds=reader.positive("seconds"),
    )
