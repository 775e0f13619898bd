"""At which accepted length does speculation start to pay? A drafted step's time over a plain one's.

    python scripts/bench_breakeven.py --drafter smollm2-135m-eagle
    python scripts/bench_breakeven.py --drafter self:6 --nodes 4 8 --batches 1 4 10 --slots 512 2048
    python scripts/bench_breakeven.py --drafter DIR --dtype bfloat16

Nothing is accepted: a step of T nodes that took ``x`` plain steps pays from ``x`` tokens a step on. Plain and
drafted steps run by turns over the same cache, three quarters full; ``control`` is a second plain program's
time over the first's, which says what this machine can resolve. ``planned`` is what the planner reckons from
its calibration, or from the data sheet where there is none. Beside it what the step consists of: ``draft``
(the rest of a step whose verification was timed with a drafter that costs nothing).
"""

import argparse
import statistics
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp

from specmemo_jax.checkpoints import open_checkpoint, resolve
from specmemo_jax.devices.compiler import enable_compilation_cache
from specmemo_jax.devices.table import live_device
from specmemo_jax.draft.protocol import Drafter
from specmemo_jax.errors import ConfigError
from specmemo_jax.llama.packing import Target, pack
from specmemo_jax.measure.timing import BlankDrafter, engine_at, part_filled, step_case
from specmemo_jax.planning.request import drafter_named, speed_for, workload_for
from specmemo_jax.planning.search import PlanRequest


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--drafter", default="smollm2-135m-eagle")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--nodes", nargs="+", type=int, default=[2, 4, 6, 8])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 10])
    parser.add_argument("--slots", nargs="+", type=int, default=[512])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="of a program, timed together")
    options = parser.parse_args()
    enable_compilation_cache()
    checkpoint = open_checkpoint(resolve(options.model).path)
    target = pack(checkpoint.config, checkpoint.tensors(), jnp.dtype(options.dtype))
    spec, workload = live_device(), workload_for(checkpoint.config)
    request = PlanRequest(checkpoint.config, options.dtype, spec, workload)
    speed, item = speed_for(request, options.model), target.dtype.itemsize
    print(
        f"{options.model}, {options.dtype}, {options.drafter}, on {spec.name}, jax {jax.__version__}; "
        f"planned: {speed.source}"
    )
    columns = (
        "B",
        "S",
        "T",
        "plain ms",
        "control",
        "step ms",
        "verify ms",
        "draft ms",
        "pays from",
        "planned",
    )
    print("".join(f"{column:>11}" for column in columns))
    for batch in options.batches:
        for slots in options.slots:
            for nodes in options.nodes:
                drafter = drafter_named(options.drafter, nodes, checkpoint.config, request)
                if not isinstance(drafter, Drafter):
                    raise ConfigError(f"drafter {options.drafter!r} has no fixed tree; a head would work")
                plain, again, verify, step = times(target, drafter, batch, slots, options)
                of_draft = speed.draft_seconds(
                    drafter.work(checkpoint.config, item, batch, slots), options.dtype
                )
                seconds = [
                    speed.step_seconds(checkpoint.config, options.dtype, batch, n, slots) for n in (1, nodes)
                ]
                figures = (
                    f"{plain * 1e3:.1f}",
                    f"{again / plain:.2f}",
                    f"{step * 1e3:.1f}",
                    f"{verify * 1e3:.1f}",
                    f"{(step - verify) * 1e3:.1f}",
                    f"{step / plain:.2f}",
                    f"{(seconds[1] + of_draft) / seconds[0]:.2f}",
                )
                cells = (batch, slots, nodes, *figures)
                print("".join(f"{cell:>11}" for cell in cells), flush=True)


def times(
    target: Target, drafter: Drafter, batch: int, slots: int, options: argparse.Namespace
) -> list[float]:
    """Median seconds of a plain step twice, of verifying as many nodes as the tree has, and of a drafted
    step, each beside the others.
    """
    runs = [
        case(target, chosen, batch, slots, options.steps)
        for chosen in (None, None, BlankDrafter(drafter.num_nodes), drafter)
    ]
    for run in runs:
        run()
    seconds = [[run() for run in runs] for _ in range(options.rounds)]
    return [statistics.median(column) for column in zip(*seconds, strict=True)]


def case(target: Target, drafter: Drafter | None, batch: int, slots: int, steps: int) -> Callable[[], float]:
    """A function that times ``steps`` steps; seconds a step."""
    engine = engine_at(target, drafter, batch, slots)
    nodes = 1 if drafter is None else drafter.num_nodes
    states = {(batch, slots): part_filled(engine, slots)}
    return step_case(engine, engine.step_program(slots, nodes=nodes), states, (batch, slots), steps)


if __name__ == "__main__":
    sys.exit(main())
