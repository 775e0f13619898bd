"""``specmemo plan``: what generation will take on a device, before anything is loaded."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from specmemo_jax.cli import options
from specmemo_jax.cli.failures import describe
from specmemo_jax.cli.options import GroupedHelp, count, row_count
from specmemo_jax.devices.quiet import quiet_plugins
from specmemo_jax.errors import ConfigError, SpecMemoError

if TYPE_CHECKING:
    from specmemo_jax.memory.plan import MemoryPlan

REFUSED = 3
EPILOG = """Examples:

\b
specmemo plan
specmemo plan llama-2-7b-chat --device titan-rtx
specmemo plan llama-2-70b-chat --device mi250-gcd --mesh 8 --batch 4 --context 4096
specmemo plan --memory-budget 1GiB --frontier frontier.svg --json
"""


class PlanCommand(GroupedHelp):
    """With ``--json`` a usage error, too, is an object on standard output and exit code 3."""

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> Any:
        """Read the command's own options."""
        as_json = "--json" in args
        try:
            return super().make_context(info_name, args, *rest, **extra)
        except Exception as error:
            message = getattr(error, "format_message", None)  # typer's usage errors have it
            if as_json and message is not None:
                _refuse(error, message())
            raise


def plan(
    model: options.PlanModel = None,
    model_option: options.PlanModelOption = None,
    device: options.PlanDevice = "auto",
    memory_budget: options.MemoryBudget = None,
    batch: options.PlanBatch = "1",
    context: options.PlanContext = None,
    prompt_tokens: options.PlanPromptTokens = None,
    new_tokens: options.PlanNewTokens = None,
    request_tokens: options.PlanRequestTokens = None,
    drafter: options.Drafter = "auto",
    tree_nodes: options.PlanTreeNodes = None,
    dtype: options.PlanDtype = "auto",
    kv_cache_dtype: options.PlanCacheDtype = "auto",
    mesh: options.PlanMesh = "1",
    policy: options.PlanPolicy = "plan",
    prove: options.Prove = False,
    as_json: options.PlanJson = False,
    frontier: options.Frontier = None,
    measured: options.Measured = None,
) -> None:
    """Say what generation takes on a device and how fast it will be; nothing is loaded.

    Among drafters, trees and buffer sizes the plan with the most expected tokens a second under the budget
    (default: the device's memory) is shown: every buffer with its bytes, the least budgets, and where the
    expectations came from. A budget that is too small, or anything else that cannot be, is refused with what
    would work and exit code 3.
    """
    with _refusals(as_json):
        name = _model(model, model_option)
        numbers = {
            "batch": row_count("--batch", batch),
            "context": _count("--context", context),
            "prompt_tokens": _count("--prompt-tokens", prompt_tokens),
            "new_tokens": _count("--new-tokens", new_tokens),
            "tree_nodes": _count("--tree-nodes", tree_nodes),
            "shards": _count("--mesh", mesh),
        }
        lengths = [
            count("--request-tokens", part.strip()) for part in (request_tokens or "").split(",") if part
        ]
        if measured is not None and frontier is None:
            raise ConfigError("--measured is shown in a frontier; --frontier FILE.png, .svg or .csv works")
        with quiet_plugins():
            from specmemo_jax.planning import frontier as plan_frontier
            from specmemo_jax.planning import view as plan_view
            from specmemo_jax.planning.request import planning_for

            if frontier is not None:
                plan_frontier.check_frontier_file(Path(frontier))
            points = () if measured is None else plan_frontier.read_measured(Path(measured))
            planning = planning_for(
                name,
                device=device,
                dtype=dtype,
                kv_cache_dtype=kv_cache_dtype,
                drafter=drafter,
                memory_budget=memory_budget,
                policy=policy,
                request_tokens=lengths,
                **numbers,  # pyright: ignore[reportArgumentType]
            )
            found = planning.plan()
        if prove:
            found = _prove(found)
        if frontier is not None:
            plan_frontier.write_frontier(Path(frontier), planning.frontier(), found, name, points)
    if as_json:
        print(json.dumps(plan_view.as_json(found, name), ensure_ascii=False))
    else:
        sys.stdout.write(plan_view.as_text(found, name, color=_in_color()))


def _prove(found: "MemoryPlan") -> "MemoryPlan":
    """The plan with the compiler's word; says on stderr what is being compiled."""
    assert found.device is not None
    with quiet_plugins():
        import jax

        from specmemo_jax.devices.probe import backend_started
        from specmemo_jax.planning.prove import compile_target_for, prove

        if found.shapes.shards > 1 and not backend_started():
            jax.config.update("jax_num_cpu_devices", found.shapes.shards)
        place = compile_target_for(found.device, found.shapes.dtype, found.shapes.shards)
    on_terminal = sys.stderr.isatty()
    clear = "\r\x1b[K" if on_terminal else ""

    def say(program: str) -> None:
        text = f"{clear}compiling {program} for {place.name}"
        print(text, end="" if on_terminal else "\n", file=sys.stderr, flush=True)

    try:
        return prove(found, place, say)
    finally:
        print(clear, end="", file=sys.stderr, flush=True)


def _model(argument: str | None, option: str | None) -> str:
    if argument is not None and option is not None and argument != option:
        raise ConfigError(
            f"one model is planned for, found {argument} and --model {option}; either would work"
        )
    return argument if argument is not None else option if option is not None else options.DEFAULT_MODEL


def _count(option: str, text: str | None) -> int | None:
    return None if text is None else count(option, text)


@contextmanager
def _refusals(as_json: bool) -> Iterator[None]:
    """What cannot be planned ends the command with exit code 3: a line on stderr, or an object."""
    try:
        yield
    except (SpecMemoError, OSError) as error:
        if as_json:
            _refuse(error, describe(error))
        print(f"specmemo: error: {describe(error)}", file=sys.stderr)
        raise typer.Exit(REFUSED) from None


def _refuse(error: BaseException, text: str) -> None:
    print(json.dumps({"error": text, "least_budget_bytes": getattr(error, "least_budget", None)}))
    raise typer.Exit(REFUSED) from None


def _in_color() -> bool:
    import os

    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
