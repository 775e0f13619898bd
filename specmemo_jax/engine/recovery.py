"""After an allocation failed all the same: give something up, rebuild from the ids on the host, go on.

The ladder: a smaller tree, no drafter, half the rows. The context is never cut, and in float32 the
tokens stay what they would have been.
"""

from specmemo_jax.engine.engine import Engine
from specmemo_jax.errors import CapacityError
from specmemo_jax.files.byte_size import format_bytes


def step_down(engine: Engine, error: BaseException) -> str:
    """Give up the next thing on the ladder and start with an empty device state; says what it was.

    Raises CapacityError, with the numbers, where nothing is left to give up.
    """
    plan, shapes = engine.plan, engine.shapes
    drafter, batch = shapes.drafter, shapes.batch
    smaller = [rung for rung in shapes.tree_sizes if 1 < rung < shapes.tree_nodes]
    if drafter is not None and smaller:
        given_up = f"trees of {shapes.tree_nodes} nodes for {smaller[-1]}"
        drafter = drafter.limited(smaller[-1])
    elif drafter is not None:
        given_up, drafter = f"drafter {drafter.name} for plain decoding", None
    elif shapes.batch > 1:
        batch = shapes.batch // 2
        given_up = f"{shapes.batch} rows at once for {batch}"
    else:
        raise CapacityError(
            f"the device is out of memory with nothing left to give up: the plan needs "
            f"{format_bytes(plan.peak_bytes)} ({format_bytes(plan.weights_bytes)} of weights, "
            f"context {shapes.context}), "
            f"and an allocation failed ({str(error).splitlines()[0]}); "
            "a smaller max_context, or ending what else uses the device, would work"
        ) from error
    smaller_plan = plan.resized(drafter, batch)
    engine.replan(smaller_plan)
    return (
        f"out of device memory; gave up {given_up}: "
        f"{format_bytes(smaller_plan.peak_bytes)} planned now, {format_bytes(plan.peak_bytes)} before"
    )
