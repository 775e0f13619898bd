"""Which request lies in which row. Host only: nothing here touches the device."""

from collections.abc import Iterator

from specmemo_jax.engine.request import Request
from specmemo_jax.memory.shapes import Shapes

UNBOUNDED = 2**31  # steps of a row of the widest group, which never outgrows it


class Placement:
    """The plan's B rows, their groups, and what lies in them.

    ``rows``: the request in each row, None where it is free. ``kept``: the request that was in a row last
    and whose keys and values are still in its cache, for a prompt that begins alike.
    """

    def __init__(self, shapes: Shapes):
        self.shapes = shapes
        self._groups = shapes.groups_at(shapes.capacities[-1])
        self.rows: list[Request | None] = [None] * shapes.batch
        self.kept: list[Request | None] = [None] * shapes.batch

    def group_of(self, row: int) -> int:
        """The group that a row is of."""
        return self._groups.place(row)[0]

    @property
    def free(self) -> list[int]:
        """Rows without a request, rising."""
        return [row for row, request in enumerate(self.rows) if request is None]

    @property
    def live(self) -> dict[int, Request]:
        """Rows whose requests take part in the next step."""
        return {row: seq for row, seq in enumerate(self.rows) if seq is not None and seq.live}

    @property
    def cached(self) -> dict[int, Request]:
        """Every row whose cache holds a request: live, paused, finished or kept."""
        pairs = enumerate(zip(self.rows, self.kept, strict=True))
        return {row: mine for row, (now, before) in pairs if (mine := now or before) is not None}

    def row_for(self, tokens: int) -> int | None:
        """The free row of the narrowest group that holds so many tokens and a step; None where none does."""
        needed = min(tokens + self.shapes.slack, self.shapes.context) + self.shapes.slack
        return next((row for row in self.free if self._groups.slots_of(row) >= needed), None)

    def put(self, row: int, request: Request) -> None:
        """A request begins, or goes on, in a free row."""
        self.rows[row], self.kept[row] = request, None

    def take(self, row: int) -> Request:
        """Free a row; its cache is kept for a prompt that begins alike."""
        request = self.rows[row]
        assert request is not None
        self.rows[row], self.kept[row] = None, request
        return request

    def move(self, row: int, to: int) -> None:
        """The request of a row goes on in a free one."""
        request = self.take(row)
        self.kept[row], request.paused = None, False
        self.put(to, request)

    def steps_left(self, row: int) -> int:
        """Steps of the largest tree for which a row's group has room."""
        request = self.rows[row]
        assert request is not None
        if self.group_of(row) == len(self._groups.sizes) - 1:
            return UNBOUNDED
        room = self._groups.slots_of(row) - self.shapes.slack - len(request.ids)
        return max(0, room // self.shapes.slack)

    def outgrown(self) -> Iterator[tuple[int, int | None]]:
        """Rows whose requests have no room for a step, each with the free row of a wider group that has;
        None where all of those are taken.
        """
        for row, request in enumerate(self.rows):
            if request is not None and not request.finished and not self.steps_left(row):
                yield row, self.row_for(len(request.ids))
