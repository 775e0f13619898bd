"""After an allocation failed all the same: give something up, rebuild from the ids on the host, go on.

The ladder: a smaller tree, no drafter, half the rows. The context is never cut, and in float32 the
tokens stay what they would have been.
"""

from specmemo_jax.engine.engine import Engine
from specmemo_jax.errors import CapacityError


def step_down(engine: Engine, error: BaseException) -> str:
    """Give up the next thing on the ladder and start with an empty device state; says what it was.

    Raises CapacityError, with the numbers, where nothing is left to give up.
    """
    plan, drafter, batch = engine.plan, engine.drafter, engine.plan.batch
    smaller = [rung for rung in plan.tree_sizes if 1 < rung < plan.tree_nodes]
    if drafter is not None and smaller:
        given_up = f"trees of {plan.tree_nodes} nodes for {smaller[-1]}"
        drafter = drafter.limited(smaller[-1])
    elif drafter is not None:
        given_up, drafter = f"drafter {drafter.name} for plain decoding", None
    elif plan.batch > 1:
        batch = plan.batch // 2
        given_up = f"{plan.batch} rows at once for {batch}"
    else:
        raise CapacityError(
            f"the device is out of memory with nothing left to give up: the plan needs "
            f"{_mib(plan.peak_bytes)} ({_mib(plan.weights_bytes)} of weights, context {plan.context}), "
            f"and an allocation failed ({str(error).splitlines()[0]}); "
            "a smaller max_context, or ending what else uses the device, would work"
        ) from error
    smaller_plan = plan.resized(drafter, batch)
    engine.replan(drafter, smaller_plan)
    return (
        f"out of device memory; gave up {given_up}: "
        f"{_mib(smaller_plan.peak_bytes)} planned now, {_mib(plan.peak_bytes)} before"
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
