"""How a memory plan is shown: as text for a terminal and as one JSON object."""

import io
import textwrap
from collections.abc import Sequence
from typing import Any

from specmemo_jax.decode.rows import MAX_STOP_IDS
from specmemo_jax.decode.sampling import MAX_BAD_WORDS
from specmemo_jax.files.byte_size import format_bytes
from specmemo_jax.memory.plan import MemoryPlan

WIDTH = 100  # columns that no line exceeds
BOUNDS = (
    ("least budget", "least_budget"),
    ("least with a drafter", "least_speculative_budget"),
    ("lower bound", "lower_bound"),
)
GIB = 2**30


def as_text(plan: MemoryPlan, model: str, *, color: bool = False) -> str:
    """A searched plan in lines of at most `WIDTH` columns: its terms and totals, bounds, expectations and
    the compiler's word where there is one. ``color``: with a terminal's escape codes.
    """
    from rich.console import Console

    out = io.StringIO()
    console = Console(
        file=out,
        width=WIDTH,
        highlight=False,
        force_terminal=color,
        color_system="standard" if color else None,
    )
    console.print(_titles(plan, model))
    console.print(_memory(plan))
    console.print(_facts(plan))
    if plan.proof is not None:
        console.print(_proof(plan))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).rstrip() + "\n"


def _titles(plan: MemoryPlan, model: str) -> Any:
    shapes = plan.shapes
    from rich.text import Text

    device, work = plan.device, plan.workload
    assert device is not None
    assert work is not None
    each = f"each of {shapes.shards} x " if shapes.shards > 1 else ""
    cache = "" if shapes.cache_dtype == shapes.dtype else f" ({shapes.cache_dtype} cache)"
    where = f"{each}{device.slug} ({device.name}, {format_bytes(device.memory_bytes)})"
    first = f"{model} in {shapes.dtype}{cache} on {where}"
    rows = "1 row" if shapes.batch == 1 else f"{shapes.batch} rows"
    second = f"{rows}: {work.prompt_tokens} prompt tokens, {work.new_tokens} new; context {shapes.context}"
    if shapes.groups:
        widths = ", ".join(f"{rows} to {context}" for rows, context in shapes.groups)
        second += f"; rows in groups: {widths} tokens"
    if plan.bounds is not None and plan.bounds.most_rows is not None:
        second += f"; of at most {plan.bounds.most_rows} that fit, so many pay most"
    if shapes.policy != "plan":
        second += f"; policy {shapes.policy}"
    lines = [*textwrap.wrap(first, WIDTH), *textwrap.wrap(second, WIDTH)]
    return Text("\n".join(lines), style="bold")


def _memory(plan: MemoryPlan) -> Any:
    largest = plan.footprint.largest
    table = _table(("memory", "shape", "dtype", ">size", ">share"))

    def row(name: str, shape: tuple[int, ...], dtype: str, size_bytes: int, style: str | None = None) -> None:
        cells = (name, "x".join(map(str, shape)), dtype, format_bytes(size_bytes))
        table.add_row(*cells, f"{size_bytes / plan.peak_bytes:.1%}", style=style)

    for term in plan.buffers:
        row(term.name, term.shape, term.dtype, term.bytes)
    table.add_section()
    row(f"{largest.name} (the largest program)", (), "", largest.bytes, "dim")
    for term in largest.terms:
        row(f"  {term.name}", term.shape, term.dtype, term.bytes)
    table.add_section()
    if plan.reserve_bytes:
        row("runtime reserve", (), "", plan.reserve_bytes)
    if plan.generation_bytes > plan.model_generation_bytes:
        row("beyond the theory (compiler)", (), "", plan.generation_bytes - plan.model_generation_bytes)
    row("generation memory", (), "", plan.generation_bytes, "bold")
    row("peak", (), "", plan.peak_bytes, "bold")
    return table


def _facts(plan: MemoryPlan) -> str:
    shapes = plan.shapes
    facts: list[tuple[str, str]] = []
    if plan.bounds is not None:
        for name, field in BOUNDS:
            found = getattr(plan.bounds, field)
            if found is not None:
                facts.append((name, f"{format_bytes(found)} ({found} bytes)"))
    tree = f"{shapes.drafter_name}, {shapes.tree_nodes} nodes, depth {shapes.trees.max_depth}"
    facts.append(("drafter", tree if shapes.drafter is not None else "none (plain decoding)"))
    parts = [f"prompt chunks {_list(shapes.chunks)}", f"cache slots {_list(shapes.capacities)}"]
    for what, nodes in (("scores", shapes.score_nodes), ("logits", shapes.logit_nodes)):
        if nodes is not None:
            parts.append(f"{what} of {nodes} nodes at once")
    facts.append(("shapes", "; ".join(parts)))
    expected = plan.expected
    if expected is not None:
        speed, plain = expected.tokens_per_second, expected.vanilla_tokens_per_second
        against = f"; {plain:.1f} without a drafter ({speed / plain:.2f}x)"
        facts += [
            ("expected", f"{speed:.1f} tokens/s{against if shapes.drafter is not None else ''}"),
            ("", expected.speed_source),
            ("accepted length", f"{expected.accepted_length:.2f} tokens a step"),
            ("", expected.acceptance_source),
        ]
        if expected.cache_source:
            facts.append(("cache", expected.cache_source))
    margin = 2 + max(len(name) for name, _ in BOUNDS) + 2
    lines = []
    for name, text in facts:
        first = f"  {name}".ljust(margin)
        lines += textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=" " * margin)
    return "\n".join(lines)


def _proof(plan: MemoryPlan) -> Any:
    from rich.console import Group

    proof = plan.proof
    assert proof is not None
    table = _table(
        (f"compiled for {proof.compiled_for}, {proof.dtype}", ">theory", ">compiler", ">difference")
    )
    for name, compiled in proof.programs:
        theory = theory_of(plan, name)
        difference = "" if theory is None else _signed(theory - compiled)
        table.add_row(
            name, "-" if theory is None else format_bytes(theory), format_bytes(compiled), difference
        )
    table.add_section()
    over = _signed(plan.model_generation_bytes - proof.generation_bytes)
    cells = format_bytes(plan.model_generation_bytes), format_bytes(proof.generation_bytes)
    table.add_row("generation memory", *cells, over, style="bold")
    if proof.dtype == plan.shapes.dtype:
        return table
    return Group(table, f"  {proof.dtype} stands in for {plan.shapes.dtype}, which this compiler lacks.")


def theory_of(plan: MemoryPlan, program: str) -> int | None:
    """What the theory gives a compiled program beside the persistent buffers; None where it prices none of
    that name because a larger one covers it (catching up, restoring).
    """
    name = program.split(",")[0]
    return next((p.bytes for p in plan.footprint.programs if p.name == name), None)


def as_json(plan: MemoryPlan, model: str) -> dict[str, Any]:
    """A searched plan as plain data: sizes in bytes a device, tokens/s of all rows together."""
    shapes = plan.shapes
    bounds, expected, work, device = plan.bounds, plan.expected, plan.workload, plan.device
    assert bounds is not None
    assert expected is not None
    assert work is not None
    assert device is not None
    found = {
        "model": model,
        "device": {
            "slug": device.slug,
            "name": device.name,
            "platform": device.platform,
            "memory_bytes": device.memory_bytes,
            "reserve_bytes": device.reserve_bytes,
        },
        "dtype": shapes.dtype,
        "kv_dtype": shapes.cache_dtype,
        "policy": shapes.policy,
        "workload": {
            "batch": work.batch,
            "prompt_tokens": work.prompt_tokens,
            "new_tokens": work.new_tokens,
            "context": work.context,
        },
        "peak_bytes": plan.peak_bytes,
        "generation_bytes": plan.generation_bytes,
        "model_generation_bytes": plan.model_generation_bytes,
        "least_budget_bytes": bounds.least_budget,
        "least_speculative_budget_bytes": bounds.least_speculative_budget,
        "lower_bound_bytes": bounds.lower_bound,
        "most_rows": bounds.most_rows,
        "expected_tokens_per_second": expected.tokens_per_second,
        "vanilla_tokens_per_second": expected.vanilla_tokens_per_second,
        "expected_accepted_length": expected.accepted_length,
        "drafter": shapes.drafter_name,
        "shapes": {
            "batch": shapes.batch,
            "context": shapes.context,
            "groups": [list(group) for group in shapes.groups],
            "capacities": list(shapes.capacities),
            "chunks": list(shapes.chunks),
            "tree_nodes": shapes.tree_nodes,
            "tree_sizes": list(shapes.tree_sizes),
            "verify_buckets": list(shapes.trees.verify_buckets),
            "max_depth": shapes.trees.max_depth,
            "score_nodes": shapes.score_nodes,
            "logit_nodes": shapes.logit_nodes,
            "shards": shapes.shards,
            "max_stop_ids": MAX_STOP_IDS,
            "max_bad_words": list(MAX_BAD_WORDS),
        },
        "largest_program": plan.footprint.largest.name,
        "terms": [
            {"name": t.name, "shape": list(t.shape), "dtype": t.dtype, "bytes": t.bytes} for t in plan.terms
        ],
        "sources": {
            "device": device.source,
            "speed": expected.speed_source,
            "acceptance": expected.acceptance_source,
            "cache": expected.cache_source,
        },
    }
    if plan.proof is not None:
        proof = plan.proof
        found |= {
            "compiled_peak_bytes": plan.reserve_bytes + plan.weights_bytes + proof.generation_bytes,
            "compiled_generation_bytes": proof.generation_bytes,
            "compiled_for": proof.compiled_for,
            "compiled_dtype": proof.dtype,
            "programs": [
                {"name": name, "model_bytes": theory_of(plan, name), "compiled_bytes": compiled}
                for name, compiled in proof.programs
            ],
        }
    return found


def _signed(size_bytes: int) -> str:
    return f"{'+' if size_bytes >= 0 else ''}{format_bytes(size_bytes)}"


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _table(columns: Sequence[str]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, header_style="dim", border_style="dim", pad_edge=True, show_edge=True)
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.lstrip(">"), justify="right" if right else "left", no_wrap=True)
    return table
