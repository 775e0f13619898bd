"""The frontier of memory and speed: the fastest plans for their bytes, as a CSV file or a picture."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specmemo_jax.errors import ConfigError, SpecMemoError
from specmemo_jax.memory.plan import MemoryPlan
from specmemo_jax.planning.view import BOUNDS, GIB

PICTURES = (".png", ".svg")
COLUMNS = (
    "kind", "peak_bytes", "generation_bytes", "tokens_per_second", "accepted_length", "drafter", "tree_nodes",
    "chunk", "score_nodes", "logit_nodes", "context",
)  # fmt: skip


def check_frontier_file(file: Path) -> None:
    """Raise before anything is computed: ConfigError for a suffix that cannot be written, SpecMemoError
    where matplotlib is missing for a picture.
    """
    suffix = file.suffix.lower()
    if suffix not in (*PICTURES, ".csv"):
        raise ConfigError(f"a frontier cannot be written as {file.name!r}; .png, .svg or .csv would work")
    if suffix in PICTURES:
        try:
            import matplotlib  # noqa: F401  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise SpecMemoError(
                f"drawing {file.name} needs matplotlib, which is not installed; "
                "pip install 'specmemo-jax[plot]', or a .csv file, would work"
            ) from None


def read_measured(file: Path) -> list[tuple[int, float, str]]:
    """Measured points of a CSV file: ``peak_bytes``, ``tokens_per_second`` and, if there, ``label``.

    Raises ConfigError naming the line that is not understood.
    """
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            rows = csv.DictReader(lines)
            missing = {"peak_bytes", "tokens_per_second"} - set(rows.fieldnames or ())
            if missing:
                raise ConfigError(
                    f"{file} has no column {', '.join(sorted(missing))}; "
                    "peak_bytes,tokens_per_second as the first line would work"
                )
            return [_point(file, rows.line_num, row) for row in rows]
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not a text file"
        raise ConfigError(f"measured points cannot be read from {file}: {why}") from None


def _point(file: Path, line: int, row: dict[str, str]) -> tuple[int, float, str]:
    try:
        peak, rate = int(row["peak_bytes"]), float(row["tokens_per_second"])
    except (TypeError, ValueError):
        peak, rate = 0, 0.0
    if peak < 1 or not 0 < rate < math.inf:
        raise ConfigError(
            f"{file}, line {line}: peak_bytes {row['peak_bytes']!r} and tokens_per_second "
            f"{row['tokens_per_second']!r}; a whole number of bytes and a number, both above 0, would work"
        )
    return peak, rate, row.get("label") or "measured"


def write_frontier(
    file: Path,
    plans: Sequence[MemoryPlan],
    chosen: MemoryPlan,
    model: str,
    measured: Sequence[tuple[int, float, str]] = (),
) -> None:
    """Write ``plans`` by rising peak, the ``chosen`` one, its bounds and ``measured`` points to ``file``."""
    if file.suffix.lower() == ".csv":
        with file.open("w", newline="", encoding="utf-8") as out:
            csv.writer(out, lineterminator="\n").writerows(frontier_rows(plans, chosen, measured))
        return
    _draw(file, plans, chosen, model, measured)


def frontier_rows(
    plans: Sequence[MemoryPlan], chosen: MemoryPlan, measured: Sequence[tuple[int, float, str]] = ()
) -> list[tuple[Any, ...]]:
    """A line of `COLUMNS`, then one a point; ``kind`` says of what: expected, chosen, a bound or measured."""
    rows: list[tuple[Any, ...]] = [COLUMNS]
    for kind, plan in (*(("expected", plan) for plan in plans), ("chosen", chosen)):
        expected = plan.expected
        assert expected is not None
        rates = (f"{expected.tokens_per_second:.6g}", f"{expected.accepted_length:.6g}")
        s = plan.shapes
        choice = s.drafter_name, s.tree_nodes, s.chunks[0], s.score_nodes, s.logit_nodes
        rows.append((kind, plan.peak_bytes, plan.generation_bytes, *rates, *choice, s.context))
    rest = (None,) * (len(COLUMNS) - 4)
    for _, field in BOUNDS:
        found = getattr(chosen.bounds, field)
        if found is not None:
            rows.append((field, found, None, None, *rest))
    rows += [(label, peak, None, f"{rate:.6g}", *rest) for peak, rate, label in measured]
    return rows


def _draw(
    file: Path,
    plans: Sequence[MemoryPlan],
    chosen: MemoryPlan,
    model: str,
    measured: Sequence[tuple[int, float, str]],
) -> None:
    """Write ``plans`` (by rising peak) to ``file``, a .png or .svg, with the ``chosen`` plan, its bounds and
    ``measured`` points (bytes, tokens/s, label) marked.
    """
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    assert chosen.device is not None
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    context = f"expected, context {plans[0].shapes.context}"
    axes.plot(*_points(plans), drawstyle="steps-post", marker="o", markersize=4, color="C0", label=context)
    for style, (name, field) in zip((":", "-.", "--"), BOUNDS, strict=True):
        found = getattr(chosen.bounds, field)
        if found is not None:
            label = f"{name} {found / GIB:.3f} GiB"
            axes.axvline(found / GIB, linestyle=style, linewidth=1, color="0.5", label=label)
    for number, label in enumerate(dict.fromkeys(label for _, _, label in measured)):
        xs = [peak / GIB for peak, _, name in measured if name == label]
        ys = [rate for _, rate, name in measured if name == label]
        axes.plot(xs, ys, "s", markersize=5, color=f"C{number + 2}", label=label)
    shapes = chosen.shapes
    star = f"chosen: {shapes.drafter_name}, T={shapes.tree_nodes}, context {shapes.context}"
    axes.plot(*_points([chosen]), "*", markersize=14, color="C1", label=star)
    axes.set_xlabel("peak device memory, GiB" + (" a device" if chosen.shapes.shards > 1 else ""))
    axes.set_ylabel("tokens/s")
    axes.margins(y=0.1)
    axes.set_ylim(bottom=0)
    axes.set_title(
        f"{model} on {chosen.device.slug}, {chosen.shapes.dtype}, batch {chosen.batch}", loc="left"
    )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix.lower() == ".svg" else None)


def _points(plans: Sequence[MemoryPlan]) -> tuple[list[float], list[float]]:
    rates = [plan.expected.tokens_per_second for plan in plans if plan.expected is not None]
    return [plan.peak_bytes / GIB for plan in plans], rates
