"""Where the time of one step goes: the program's own operations by part, beside what memory and units allow.

    python scripts/bench_step.py                                  # float32 and bfloat16, S = 256, 512, 2,048
    python scripts/bench_step.py --dtypes float32 --shapes 32x1 --slots 256 --fills 1
    python scripts/bench_step.py --sampled                        # rows with temperature, top_p and top_k

``--shapes``: rows x nodes. ``--fills``: the share of the slots that is used. Times are the self times of the
compiled program's operations as JAX's profiler tells them, by the part of the model that they came from
(`jax.named_scope`), the mean over steps; ``step`` is the median wall time of a step without the profiler,
``rest`` what of it no operation accounts for. The floor of a part is the larger of its bytes (of weights, and
of the used slots) over the memory's speed and its FLOPs over the rate of a large product, both measured here
in the same dtype.
"""

import argparse
import collections
import dataclasses
import gc
import glob
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specmemo_jax.checkpoints import open_checkpoint, resolve
from specmemo_jax.decode.rows import Rows
from specmemo_jax.devices.compiler import enable_compilation_cache
from specmemo_jax.engine.engine import Engine
from specmemo_jax.llama.config import LlamaConfig
from specmemo_jax.llama.packing import Target, pack
from specmemo_jax.measure.timing import BlankDrafter, memory_speed, product_rate
from specmemo_jax.memory.plan import lay_out
from specmemo_jax.memory.shapes import Shapes

PARTS = ("products", "attention", "logits", "choose", "norms", "rope", "commit", "other")


def main() -> None:
    """Measure and print a table a dtype."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--shapes", nargs="+", default=["1x1", "8x1", "16x1", "32x1", "1x16", "8x8"])
    parser.add_argument("--slots", nargs="+", type=int, default=[256, 512, 2048])
    parser.add_argument("--fills", nargs="+", type=float, default=[0.2, 1.0])
    parser.add_argument("--steps", type=int, default=8, help="profiled steps, and as many timed ones")
    parser.add_argument("--sampled", action="store_true")
    options = parser.parse_args()
    enable_compilation_cache()
    checkpoint = open_checkpoint(resolve(options.model).path)
    device = jax.devices()[0]
    print(f"{options.model} on {processor(device)}, jax {jax.__version__}, ms a step; in brackets the floor")
    for dtype in options.dtypes:
        target = pack(checkpoint.config, checkpoint.tensors(), jnp.dtype(dtype))
        roofs = memory_speed(), product_rate(target.dtype)
        print(f"\n{dtype}: {roofs[0] / 1e9:.1f} GB/s, {roofs[1] / 1e9:.0f} GFLOP/s")
        print(
            f"{'B x T':>6}{'S':>6}{'used':>6}{'step':>8}"
            + "".join(f"{part:>15}" for part in PARTS)
            + "   rest"
        )
        for shape in options.shapes:
            batch, nodes = map(int, shape.split("x"))
            for slots in options.slots:
                for used, line in measured(target, batch, nodes, slots, roofs, options):
                    print(f"{shape:>6}{slots:>6}{used:>6}{line}", flush=True)
                gc.collect()


def processor(device: Any) -> str:
    """The device's name, with a CPU's units for small products."""
    if device.platform != "cpu":
        return f"{device.device_kind} ({device.platform})"
    try:
        with open("/proc/cpuinfo") as lines:
            pairs = (line.split(":", 1) for line in lines if ":" in line)
            facts = {key.strip(): value.strip() for key, value in pairs}
    except OSError:
        return device.device_kind
    flags = [
        flag
        for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
        if flag in facts.get("flags", "").split()
    ]
    name = next((facts[key] for key in facts if key.startswith("model name")), device.device_kind)
    return f"{name} ({', '.join(flags)})"


def measured(
    target: Target,
    batch: int,
    nodes: int,
    slots: int,
    roofs: tuple[float, float],
    options: argparse.Namespace,
) -> Iterator[tuple[int, str]]:
    """The table's line for each share of the slots that is used."""
    drafter = BlankDrafter(nodes) if nodes > 1 else None
    room = nodes + 2 * (options.steps + 1)  # for what the steps measured emit
    context = min(slots - nodes, target.config.max_context)
    shapes = Shapes(
        target.config, target.dtype.name, target.platform, context, batch, drafter, capacities=(slots,)
    )
    engine = Engine(target, lay_out(shapes))
    program = engine.step_program(slots, sampled=options.sampled, nodes=nodes)
    parts = parts_of(program, target.config.vocab_size)
    for fill in options.fills:
        used = int(fill * (slots - room))
        state = filled(engine, slots, used, options.sampled)
        wall = []
        for _ in range(options.steps + 1):
            began = time.perf_counter()
            state, _ = program(target.leaves, engine.draft_weights, state)
            jax.block_until_ready(state)
            wall.append(time.perf_counter() - began)
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                for _ in range(options.steps):
                    state, _ = program(target.leaves, engine.draft_weights, state)
                    jax.block_until_ready(state)
            seconds = operations(folder)
        by_part: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        for name, total in seconds.items():
            by_part[parts.get(name, "other")] += total / options.steps
        floor = floors(target.config, target.dtype.itemsize, batch, nodes, used, roofs)
        step = statistics.median(wall[1:])  # a program's first takes longer
        cells = "".join(
            f"{f'{by_part[part] * 1e3:.1f}' + (f' ({floor[part] * 1e3:.1f})' if part in floor else ''):>15}"
            for part in PARTS
        )
        yield used, f"{step * 1e3:>8.1f}{cells}{(step - sum(by_part.values())) * 1e3:>7.1f}"
    jax.tree.map(lambda leaf: leaf.delete(), state)
    engine.close()


def filled(engine: Engine, slots: int, used: int, sampled: bool) -> Any:
    """A state whose rows have ``used`` committed positions and are live."""
    state = engine.programs.empty_state(slots)
    rows: Rows = state.rows
    settings = dataclasses.replace(rows.settings, left=jnp.full_like(rows.settings.left, slots))
    if sampled:
        B = rows.lengths.shape[0]
        filters = {
            "temperature": jnp.full((B,), 0.8),
            "top_p": jnp.full((B,), 0.95),
            "top_k": jnp.full((B,), 50),
        }
        settings = dataclasses.replace(settings, sampling=dataclasses.replace(settings.sampling, **filters))
    lengths, done = jnp.full_like(rows.lengths, used), jnp.zeros_like(rows.done)
    rows = dataclasses.replace(rows, lengths=lengths, done=done, settings=settings)
    return dataclasses.replace(state, rows=rows)


def parts_of(program: jax.stages.Compiled, vocab_size: int) -> dict[str, str]:
    """The part of the model that each operation of a compiled program came from, by its name.

    Where XLA has dropped an operation's origin, a product tells by its shape what it is.
    """
    found: dict[str, str] = {}
    inside: dict[str, str] = {}  # a computation's part, by its products
    computation = ""
    for line in (program.as_text() or "").splitlines():
        if line.endswith("{"):
            computation = line.split()[0].lstrip("%")
        match = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (.+?) ([\w\-]+)\(", line)
        if match is None:
            continue
        name, shape, kind = match.groups()
        origin = re.search(r'op_name="([^"]*)"', line)
        called = re.search(r"calls=%?([\w.\-]+)", line)
        scopes = [scope for scope in origin[1].split("/") if scope in PARTS] if origin else []
        if scopes:
            found[name] = scopes[0]
        elif kind == "dot":
            large = str(vocab_size) in re.findall(r"\d+", shape.split("{")[0])
            found[name] = "logits" if large else "attention" if "batch_dims" in line else "products"
        elif called and called[1] in inside:
            found[name] = inside[called[1]]
        if kind == "dot":
            inside[computation] = found[name]
    return found


def operations(folder: str) -> dict[str, float]:
    """Self seconds of every operation that a profile has, by its name."""
    (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
    total: dict[str, float] = collections.defaultdict(float)
    for plane in jax.profiler.ProfileData.from_file(path).planes:
        for line in plane.lines:
            events = sorted(
                (
                    (e.start_ns, -e.duration_ns, dict(e.stats)["hlo_op"])
                    for e in line.events
                    if _is_operation(e)
                ),
            )
            around: list[tuple[float, str]] = []  # the ends and names of the operations that hold this one
            for start, negative, name in events:
                while around and around[-1][0] <= start:
                    around.pop()
                if around:
                    total[around[-1][1]] += negative / 1e9
                total[name] -= negative / 1e9
                around.append((start - negative, name))
    return total


def _is_operation(event: Any) -> bool:
    return not event.name.startswith("end: ") and any(key == "hlo_op" for key, _ in event.stats)


def floors(
    config: LlamaConfig, itemsize: int, batch: int, nodes: int, used: int, roofs: tuple[float, float]
) -> dict[str, float]:
    """Seconds that the large parts take at least."""
    speed, rate = roofs
    head, kv = (
        config.vocab_size * config.hidden_size,
        config.num_layers * config.num_kv_heads * config.head_dim,
    )
    shapes = config.tensor_shapes()
    matrices = sum(
        int(np.prod(shape))
        for name, shape in shapes.items()
        if len(shape) == 2 and name.startswith("layers.")
    )
    rows, queries = batch * nodes, config.num_layers * config.num_heads * config.head_dim
    work = {
        "products": (matrices * itemsize, 2 * matrices * rows),
        "attention": (2 * kv * itemsize * batch * used, 4 * queries * rows * (used + nodes)),
        "logits": (head * itemsize, 2 * head * rows),
    }
    return {part: max(size / speed, flops / rate) for part, (size, flops) in work.items()}


if __name__ == "__main__":
    sys.exit(main())
