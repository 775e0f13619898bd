"""Requests through the engine: those that wait get rows, bursts run, lost caches are rebuilt."""

import warnings
from collections import deque
from collections.abc import Iterable

import jax

from specmemo_jax.devices.allocator import is_out_of_memory
from specmemo_jax.engine.engine import Engine
from specmemo_jax.engine.recovery import step_down
from specmemo_jax.engine.request import Request
from specmemo_jax.errors import CapacityWarning


class Scheduler:
    """Decides what runs next in an engine without live rows.

    `add` takes requests in, `step` runs a burst and gives those that may have grown, and whoever sees that
    one has ended takes it out by `remove`.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.waiting: deque[Request] = deque()
        self._prepared = False

    def add(self, requests: Iterable[Request]) -> None:
        """Queue requests, behind those that wait already."""
        self.waiting.extend(requests)

    def remove(self, request: Request) -> None:
        """Take a request out, wherever it is."""
        if request in self.waiting:
            self.waiting.remove(request)
        elif request in self.engine.rows:
            self.engine.release(self.engine.rows.index(request))

    def step(self, max_steps: int) -> list[Request]:
        """Fill free rows, and run a burst of up to ``max_steps`` steps; the requests in rows after it.

        Where the device runs out of memory all the same, something is given up
        (`specmemo_jax.engine.recovery`), said in a CapacityWarning, and what was decoding goes on from its
        ids. Raises CapacityError where nothing is left to give up.
        """
        engine = self.engine
        try:
            if not self._prepared:
                engine.prepare(list(self.waiting))
                self._prepared = True
            for _ in engine.migrate_rows():
                pass
            self._fill()
            engine.burst(max_steps, len(self.waiting))
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            lost = [request for request in engine.rows if request is not None]
            warnings.warn(step_down(engine, error), CapacityWarning, stacklevel=2)
            self.waiting.extendleft(reversed(lost))
        return [request for request in engine.rows if request is not None]

    def _fill(self) -> None:
        """Give every free row the first that waits of those that it has room for."""
        for request in list(self.waiting):
            if not self.engine.placement.free:
                return
            row = self.engine.placement.row_for(len(request.ids))
            if row is not None:
                self.engine.admit(row, request)
                self.waiting.remove(request)
