"""Compiled programs: each is made when it is first asked for, or all of a plan's are made ahead."""

import itertools
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

import jax
from tqdm import tqdm

from specmemo_jax.devices.compiled import compiled_memory
from specmemo_jax.devices.compiler import noting_cache_hits
from specmemo_jax.engine.executables import ExecutableStore
from specmemo_jax.engine.programs import Programs

Kind = Literal[
    "empty state",
    "step",
    "recording step",
    "prefill",
    "catch up",
    "settle",
    "score",
    "move",
    "restore",
    "end",
]
Key = tuple[Kind, int, int, bool, int]  # kind, capacity, width, sampled, group
TOGETHER = 4  # programs compiled at once; each uses several processors, but not all the time
READING = 2  # programs read at once
BAR_AFTER = 0.5  # seconds of compiling that nobody needs to be told of


def plan_keys(programs: Programs) -> Iterator[tuple[str, Key]]:
    """Every program of the plan at its largest capacity, by name."""
    shapes, S = programs.shapes, programs.shapes.capacities[-1]
    groups = [(0, "")]
    if len(shapes.groups) > 1:
        groups = [(group, f" of {context}") for group, (_, context) in enumerate(shapes.groups)]
    for sampled in (False, True):
        how = "sampled" if sampled else "greedy"
        for nodes in shapes.tree_sizes:
            yield f"step {nodes}, {how}", ("step", S, nodes, sampled, 0)
        for width, (group, which) in itertools.product(shapes.chunks, groups):
            yield f"prefill {width}{which}, {how}", ("prefill", S, width, sampled, group)
    if programs.drafter is not None and programs.drafter.most_waiting:
        yield "settle", ("settle", S, 0, False, 0)
    if programs.drafter is not None and not programs.drafter.taps:
        for width, (group, which) in itertools.product(shapes.chunks, groups):
            yield f"catch up {width}{which}", ("catch up", S, width, False, group)
    for source, target in itertools.combinations(range(len(groups)), 2):
        yield f"move {source} to {target}", ("move", S, target, False, source)
    for width in shapes.chunks if shapes.scoring else ():
        yield f"score {width}", ("score", S, width, False, 0)
    yield "restore", ("restore", S, 0, False, 0)
    yield "end", ("end", S, 0, False, 0)


def all_keys(programs: Programs) -> Iterator[tuple[str, Key]]:
    """`plan_keys` at every capacity of the plan, and the empty states."""
    for capacity in programs.shapes.capacities:
        yield "empty state", ("empty state", capacity, 0, False, 0)
        for name, (kind, _, width, sampled, group) in plan_keys(programs):
            yield name, (kind, capacity, width, sampled, group)


def _name(key: Key) -> str:
    """A key as the name of a file."""
    kind, capacity, width, sampled, group = key
    return f"{kind.replace(' ', '-')}-{capacity}-{width}-{'sampled' if sampled else 'greedy'}-{group}"


class ProgramCache:
    """`Programs`, compiled. A program's key says what it was lowered for: its kind, the capacity, its width
    (tokens of a chunk, nodes of a step's tree, the other group of a move), whether it samples, and the group
    of the row.
    """

    def __init__(self, programs: Programs, store: ExecutableStore | None = None):
        self._programs, self._store = programs, store
        self._compiled: dict[Key, jax.stages.Compiled] = {}
        self._lock = threading.Lock()
        self._coming: dict[Key, Future[jax.stages.Compiled | None]] = {}
        self._readers: ThreadPoolExecutor | None = None

    def __contains__(self, key: Key) -> bool:
        return key in self._compiled

    def get(
        self, kind: Kind, capacity: int, width: int = 0, sampled: bool = False, group: int = 0
    ) -> jax.stages.Compiled:
        """The program of a key: as it was made before, in this process or another, or compiled now."""
        key = (kind, capacity, width, sampled, group)
        if key not in self._compiled:
            self._compiled[key] = self._stored(key) or self._made(key)
        return self._compiled[key]

    def _stored(self, key: Key) -> jax.stages.Compiled | None:
        if self._store is None:
            return None
        with self._lock:
            coming = self._coming.pop(key, None)
        found = None if coming is None else coming.result()
        return found or self._store.load(_name(key))

    def _made(self, key: Key) -> jax.stages.Compiled:
        if self._store is None:
            return self._programs.compile(self.lowered(*key))
        with noting_cache_hits() as hits:
            made = self._programs.compile(self.lowered(*key))
        if not hits:  # on a CPU, what JAX's cache gave loses functions when it is serialised again
            self._store.save(_name(key), made)
        return made

    def fetch_recent(self) -> None:
        """Begin to read what the last process used, on threads, while the weights are loaded."""
        if self._store is None or not (names := self._store.recent()):
            return
        self._readers = ThreadPoolExecutor(READING, "executables")
        keys = {_name(key): key for _, key in all_keys(self._programs)}
        for name in names:
            if (key := keys.get(name)) is not None:
                self._coming[key] = self._readers.submit(self._store.load, name)

    def close(self) -> None:
        """End what `fetch_recent` began; programs can still be asked for."""
        if self._readers is not None:
            self._readers.shutdown(cancel_futures=True)
            self._readers = None
        with self._lock:
            self._coming.clear()

    def get_all(self, keys: Sequence[Key]) -> None:
        """Have all of these programs, several compiled at a time; a bar tells a person how many are left."""
        missing = [key for key in dict.fromkeys(keys) if key not in self._compiled]
        if not missing:
            return
        with ThreadPoolExecutor(TOGETHER) as pool:
            made = pool.map(lambda key: self.get(*key), missing)
            bar = tqdm(
                made, "compiling", len(missing), leave=False, disable=None, unit="program", delay=BAR_AFTER
            )
            for _ in bar:
                pass

    def fill(self) -> None:
        """Have all of the plan's programs now."""
        empty: list[Key] = [("empty state", S, 0, False, 0) for S in self._programs.shapes.capacities]
        self.get_all([*empty, *(key for _, key in plan_keys(self._programs))])

    def lowered(self, kind: Kind, capacity: int, width: int, sampled: bool, group: int) -> jax.stages.Lowered:
        """The program of a key, not compiled."""
        programs = self._programs
        match kind:
            case "prefill":
                return programs.prefill(capacity, width, sampled, group)
            case "catch up":
                return programs.catch_up(capacity, width, group)
            case "settle":
                return programs.settle(capacity)
            case "score":
                return programs.score(capacity, width)
            case "move":
                return programs.move(capacity, group, width)
            case "restore":
                return programs.restore(capacity)
            case "end":
                return programs.end(capacity)
            case "empty state":
                return programs.empty(capacity)
            case "step" | "recording step":
                return programs.step(capacity, sampled, width, record=kind == "recording step")

    def most_extra_bytes(self, capacity: int) -> int:
        """What the hungriest of the programs so far at a capacity needs beside its arguments, says XLA."""
        programs = [program for (_, at, *_), program in self._compiled.items() if at == capacity]
        return max((compiled_memory(program).extra for program in programs), default=0)
