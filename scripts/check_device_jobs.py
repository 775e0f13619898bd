"""The parts of scripts/check_device.py, which runs each in a process of its own.

Called as ``check_device_jobs.py NAME ARGUMENTS_JSON RESULT_FILE``.
"""

import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from check_device import Result

from specmemo_jax import LLM, RequestOutput, SamplingParams, __version__
from specmemo_jax.checkpoints import open_checkpoint, resolve
from specmemo_jax.checkpoints.open import OpenModel, open_model
from specmemo_jax.devices.compiled import compiled_memory
from specmemo_jax.devices.compiler import enable_compilation_cache
from specmemo_jax.devices.table import Device, default_dtype
from specmemo_jax.draft import Drafter, NgramDrafter, make_drafter
from specmemo_jax.engine.engine import Engine
from specmemo_jax.engine.request import Request
from specmemo_jax.errors import CapacityError
from specmemo_jax.files.prompts import read_prompts
from specmemo_jax.llama.config import LlamaConfig
from specmemo_jax.llama.packing import Target, pack
from specmemo_jax.measure.timing import part_filled
from specmemo_jax.memory.plan import lay_out
from specmemo_jax.memory.shapes import Shapes
from specmemo_jax.serve.requests import device_sampling, pad_bad_words
from specmemo_jax.serve.serve import Job, serve
from specmemo_jax.testing import whole_logits

PROMPTS = Path(__file__).parent / "data" / "quickstart_prompts.jsonl"
MOST_CONTEXT = 1024
NEAR_TIE = 0.5  # logits; half precision's own noise is some hundredths
MIB = 2**20


# ---------------------------------------------------------------- device


def device(model: str, quick: bool) -> Result:
    """Versions, and what JAX says of the device."""
    first = jax.devices()[0]
    rows = [
        ["device", f"{first.device_kind}, {first.platform}; {len(jax.devices())} of them"],
        ["platform version", first.client.platform_version],
        ["driver", _driver()],
        ["compute capability", str(getattr(first, "compute_capability", ""))],
        ["memory", _memory_stats(first)],
        ["processor", f"{_processor()}, {os.cpu_count()} threads"],
        ["system", f"{platform.system()} {platform.release()}, {platform.machine()}"],
        ["Python", platform.python_version()],
        ["specmemo-jax", __version__],
        ["packages", _packages()],
        ["environment", _environment()],
        ["model", model + (", quick" if quick else "")],
        ["default dtype", default_dtype(first)],
    ]
    notes = []
    if first.platform == "cpu":
        notes.append("JAX sees no accelerator here: every figure below is the processor's.")
    return Result([[name, value] for name, value in rows if value], notes)


def _driver() -> str:
    files = (Path("/proc/driver/nvidia/version"), Path("/sys/module/amdgpu/version"))
    return "; ".join(file.read_text().splitlines()[0] for file in files if file.exists())


def _memory_stats(first: Device) -> str:
    stats = first.memory_stats()
    if not stats:
        return "no figures from the allocator"
    return ", ".join(f"{name} {value / MIB:,.0f} MiB" for name, value in stats.items() if "bytes" in name)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in _lines(info) if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _packages() -> str:
    wanted = ("jax-cuda", "jax-rocm", "nvidia-")
    found = {d.name.lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    plugins = sorted(name for name in found if name.startswith(wanted))
    return ", ".join(f"{name} {found[name]}" for name in ("jax", "jaxlib", "flax", "numpy", *plugins))


def _environment() -> str:
    wanted = ("XLA_", "JAX_PLATFORMS", "CUDA_VISIBLE", "HIP_VISIBLE", "ROCR_VISIBLE", "HSA_OVERRIDE")
    return ", ".join(
        f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(wanted)
    )


# ---------------------------------------------------------------- equality


def equality(model: str, quick: bool, dtype: str) -> Result:
    """Each drafter's token ids against those of plain decoding alone in its batch."""
    opened, target = _load(model, dtype)
    tokens = 32 if quick else 64
    prompts = _prompts(opened, min(opened.config.max_context, MOST_CONTEXT) - tokens)[:: 3 if quick else 1]
    params = {"greedy": SamplingParams(temperature=0, max_tokens=tokens)}
    if dtype == "float32" or not quick:
        params["sampled"] = SamplingParams(temperature=0.8, top_p=0.95, seed=7, max_tokens=tokens)
    plain = _answer_all(target, None, 1, prompts, params)
    rows, failures, gaps = [], [], []
    for drafter, batch in _equality_cases(target, quick):
        name = drafter.name if drafter else "none"
        drafted = _answer_all(target, drafter, batch, prompts, params)
        for way in params:
            wrong = []
            for prompt, want, got in zip(prompts, plain[way], drafted[way], strict=True):
                want_ids, got_ids = want.outputs[0].token_ids, got.outputs[0].token_ids
                if want_ids != got_ids:
                    wrong.append(prompt)
                    if way == "greedy":
                        gaps.append(logit_gap(target, prompt, want_ids, got_ids))
            lengths = [length for output in drafted[way] for length in output.metrics.accepted_lengths]
            equal = f"{len(prompts) - len(wrong)} of {len(prompts)}"
            rows.append([target.dtype.name, name, str(batch), way, equal, f"{statistics.fmean(lengths):.2f}"])
            if wrong and dtype == "float32":
                failures.append(f"float32, {name}, batch {batch}, {way}: equal in {equal} answers only")
    notes = []
    if dtype != "float32":
        notes.append(_half_note(target, gaps))
        if max(gaps, default=0.0) > NEAR_TIE:
            failures.append(f"{target.dtype.name}: an answer differs where the logits are no near-tie")
    return Result(rows, notes, failures)


def _equality_cases(target: Target, quick: bool) -> list[tuple[Drafter | None, int]]:
    """Drafters and batches; every program of a case takes seconds to compile."""
    ngram, early = _drafter("ngram", target), _drafter("self", target)
    if quick:
        return [(ngram, 1), (early, 4)] if target.dtype == jnp.float32 else [(ngram, 1)]
    drafters = (None, ngram, NgramDrafter(8, name="ngram, tree of 8"), early)
    return [(drafter, batch) for drafter in drafters for batch in (1, 4)][1:]


def _half_note(target: Target, gaps: Sequence[float]) -> str:
    name = target.dtype.name
    if not gaps:
        return f"{name}: no greedy answer differs."
    shown = ", ".join(f"{gap:.3f}" for gap in sorted(gaps))
    return (
        f"{name}: {len(gaps)} greedy answers differ, as near-ties may: steps of other widths round "
        f"differently. Between the two tokens where each pair parts the logits differ by {shown}; "
        f"more than {NEAR_TIE} would be a fault. Sampled answers are counted only."
    )


def logit_gap(target: Target, prompt: Sequence[int], want: Sequence[int], got: Sequence[int]) -> float:
    """How far apart the target's logits are for the two tokens at which two answers part."""
    at = next(i for i, (a, b) in enumerate(zip(want, got, strict=True)) if a != b)
    ids = [*prompt, *want[:at]]
    tokens = np.zeros((1, -(-len(ids) // 64) * 64), np.int32)
    tokens[0, : len(ids)] = ids
    last = slice(len(ids) - 1, len(ids))
    found = jax.jit(functools.partial(whole_logits, target, after=last))(target.leaves, tokens)[0, 0]
    return abs(float(found[want[at]] - found[got[at]]))


# ---------------------------------------------------------------- memory


def memory(model: str, quick: bool, drafter: str, dtype: str, batch: int) -> Result:
    """The plan's bytes, XLA's own, and the most that the allocator has given out."""
    first, config = jax.devices()[0], open_checkpoint(resolve(model).path).config
    # On CPU the cache grows, and every size has programs of its own; a quick run stays at the first.
    context = min(config.max_context, 224 if quick else MOST_CONTEXT)
    name = _self_name(config) if drafter == "self" else drafter
    ways = {True: SamplingParams(temperature=0.8, top_p=0.95, seed=1, max_tokens=32, ignore_eos=True)}
    if not quick:
        ways[False] = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    with LLM(model, drafter=name, dtype=_dtype(dtype), max_batch=batch, max_context=context) as llm:
        loaded = _peak(first)
        prompt = [token % config.vocab_size for token in range(context - 32)]
        for params in ways.values():
            llm.generate([prompt] * batch, params)
        measured = _peak(first)
        capacity, engine = llm.plan.shapes.capacities[-1], llm.engine
        programs = {
            "step": [engine.step_program(capacity, sampled) for sampled in ways],
            "prefill": [
                engine.prefill_program(capacity, width, sampled)
                for width in llm.plan.shapes.chunks
                for sampled in ways
            ],
        }
        compiled = {kind: _compiled_peak(of_kind) for kind, of_kind in programs.items()}
        plan = llm.plan.peak_bytes
    row = [llm.plan.shapes.dtype, name, str(batch), _mib(plan), *map(_mib, compiled.values())]
    what = f"{llm.plan.shapes.dtype}, {name}, batch {batch}"
    failures, notes = [], [f"Context {context}, all of it used{'' if quick else ', greedy and sampled'}."]
    for kind, peak in compiled.items():
        if peak is not None and peak > plan:
            failures.append(f"{what}: XLA's figure of the {kind} exceeds the plan")
    if measured is None:
        notes.append(
            "The allocator keeps no figures here. In brackets: the process's peak resident memory, "
            "Python, JAX, compiler and files read included; it is not the device's figure."
        )
        return Result([[*row, f"({_mib(_process_peak())})", ""]], notes, failures)
    notes.append(f"{what}: {_mib(loaded)} MiB at most while loading.")
    if measured > plan:
        failures.append(f"{what}: the measured peak exceeds the plan")
    return Result([[*row, _mib(measured), f"{measured / plan:.0%}"]], notes, failures)


def _compiled_peak(programs: Sequence[jax.stages.Compiled]) -> int | None:
    """The largest of XLA's own figures; None where the backend gives none."""
    try:
        return max(compiled_memory(program).peak for program in programs)
    except CapacityError:
        return None


def _mib(size: int | None) -> str:
    return "no figure" if size is None else f"{size / MIB:,.1f}"


def _peak(first: Device) -> int | None:
    stats = first.memory_stats()
    return None if not stats else stats.get("peak_bytes_in_use")


def _process_peak() -> int:
    """Most bytes this process has had resident; 0 where the system does not tell."""
    status = Path("/proc/self/status")  # getrusage would count the parent's before exec
    lines = [line for line in _lines(status) if line.startswith("VmHWM")]
    return int(lines[0].split()[1]) * 1024 if lines else 0


# ---------------------------------------------------------------- time


def steps(model: str, quick: bool, dtype: str) -> Result:
    """Whole steps (draft, verify, accept, commit) of full rows, the sizes by turns."""
    opened, target = _load(model, dtype)
    context = min(opened.config.max_context, MOST_CONTEXT)
    rounds, burst = (3, 4) if quick else (7, 8)
    rows = []
    for batch in (1,) if quick else (1, 4):
        cases: dict[int, tuple[Engine, Any, Any]] = {}
        for nodes in (1, 4, 8, 16):
            engine = _engine(target, NgramDrafter(nodes) if nodes > 1 else None, batch, context - 17)
            program = engine.step_program(context)
            state, _ = program(target.leaves, engine.draft_weights, part_filled(engine, context))
            cases[nodes] = engine, program, state
        times: dict[int, list[float]] = {nodes: [] for nodes in cases}
        for _ in range(rounds):
            for nodes, (engine, program, state) in cases.items():
                jax.block_until_ready(state)
                start = time.perf_counter()
                for _ in range(burst):
                    state, _ = program(target.leaves, engine.draft_weights, state)
                jax.block_until_ready(state)
                times[nodes].append((time.perf_counter() - start) / burst)
                cases[nodes] = engine, program, state
        medians = [statistics.median(times[nodes]) for nodes in cases]
        cells = [f"{median * 1e3:.2f} ({median / medians[0]:.2f})" for median in medians]
        rows.append([target.dtype.name, str(batch), str(context), *cells])
    return Result(rows, [f"Median of {rounds} rounds of {burst} steps, the sizes by turns."])


def speed(model: str, quick: bool, dtype: str) -> Result:
    """Prefill and decoding of single answers, plain and drafted by turns."""
    opened, target = _load(model, dtype)
    rounds, tokens = (3, 32) if quick else (5, 128)
    context = min(opened.config.max_context, MOST_CONTEXT)
    drafted = {"plain": None, "ngram": _drafter("ngram", target)}
    engines = {name: _engine(target, drafter, 1, context) for name, drafter in drafted.items()}
    prompts = _prompts(opened, context - tokens)
    chosen = {"that asks to repeat": prompts[0], "that asks to explain": prompts[-1]}
    long = np.resize(prompts[-1], context - tokens).tolist()
    engines["plain"].prepare([Request(long, tokens)])
    reads = [_time_answer(engines["plain"], long, 1)[0] for _ in range(rounds)]
    rows = []
    for name, prompt in chosen.items():
        times: dict[str, list[float]] = {way: [] for way in engines}
        lengths: list[int] = []
        for place in range(-1, rounds):  # the first round is not counted: it may compile
            for way, engine in engines.items():
                _, seconds, lengths = _time_answer(engine, prompt, tokens)
                times[way] += [(tokens - 1) / seconds] * (place >= 0)
        plain, ngram = (statistics.median(times[way]) for way in engines)
        rows.append(
            [
                target.dtype.name,
                f"{name} ({len(prompt)} tokens)",
                "",
                f"{plain:.1f}",
                f"{ngram:.1f}",
                f"{ngram / plain:.2f}",
                f"{statistics.fmean(lengths):.2f}",
            ]
        )
    prefill = len(long) / statistics.median(reads)
    rows.append([target.dtype.name, f"{len(long)} tokens", f"{prefill:,.0f}", "", "", "", ""])
    return Result(rows, [f"Median of {rounds} rounds by turns, {tokens} new tokens each."])


def _time_answer(engine: Engine, prompt: Sequence[int], tokens: int) -> tuple[float, float, list[int]]:
    """Seconds of prefill and of decoding, and the steps' accepted lengths."""
    start = time.perf_counter()
    engine.admit(0, Request(prompt, tokens))
    first = time.perf_counter()
    log = engine.rows[0]
    assert log is not None
    while not log.finished:
        engine.burst()
    end = time.perf_counter()
    engine.release(0)
    return first - start, end - first, log.accepted_lengths


# ---------------------------------------------------------------- what they share


def _load(model: str, dtype: str) -> tuple[OpenModel, Target]:
    enable_compilation_cache()
    opened = open_model(model)
    return opened, pack(opened.config, opened.tensors(), jnp.dtype(_dtype(dtype)), jax.devices()[0])


def _dtype(wanted: str) -> Any:
    """``auto`` is the device's default; ``half`` too, or bfloat16 where that is float32."""
    default = default_dtype(jax.devices()[0])
    if wanted == "auto":
        return default
    return wanted if wanted == "float32" else "bfloat16" if default == "float32" else default


def _self_name(config: LlamaConfig) -> str:
    """The first layers of a model that has more than one."""
    return f"self:{min(8, config.num_layers - 1)}" if config.num_layers > 1 else "none"


def _drafter(name: str, target: Target) -> Drafter | None:
    name = _self_name(target.config) if name == "self" else name
    return make_drafter(name, platform=target.platform, dtype=target.dtype.name)


def _engine(target: Target, drafter: Drafter | None, batch: int, context: int) -> Engine:
    plan = lay_out(
        Shapes(
            target.config,
            dtype=target.dtype.name,
            platform=target.platform,
            batch=batch,
            context=context,
            drafter=drafter,
        )
    )
    return Engine(target, plan)


def _prompts(opened: OpenModel, room: int) -> list[list[int]]:
    """The quick start's prompts as this model's token ids, the end of each that fits."""
    tokenizer = opened.tokenizer
    texts = [record.text or "" for record in read_prompts(PROMPTS)]
    if tokenizer is None:
        random = np.random.default_rng(0)
        return [random.integers(0, opened.config.vocab_size, 40).tolist() for _ in texts]
    if tokenizer.has_chat_template:
        prompts = [tokenizer.chat_ids([{"role": "user", "content": text}]) for text in texts]
    else:
        prompts = [tokenizer.encode(text) for text in texts]
    return [prompt[-room:] for prompt in prompts]


def _answer_all(
    target: Target,
    drafter: Drafter | None,
    batch: int,
    prompts: Sequence[Sequence[int]],
    params: dict[str, SamplingParams],
) -> dict[str, list[RequestOutput]]:
    """Each prompt's answer, for each way of decoding."""
    longest = max(map(len, prompts)) + max(way.max_tokens or 0 for way in params.values())
    engine = _engine(target, drafter, batch, longest)
    outputs = {}
    for name, way in params.items():
        jobs = []
        for place, prompt in enumerate(prompts):
            sampling = None
            if not way.is_plain:
                nothing = pad_bad_words([])
                sampling = device_sampling(way, prompt, (way.seed or 0) + place, nothing)
            jobs.append(Job(str(place), None, Request(prompt, way.max_tokens or 1, (), sampling), way))
        for _ in serve(engine, jobs):
            pass
        outputs[name] = [job.output for job in jobs]
    engine.close()
    return outputs


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def main() -> None:
    name, arguments, file = sys.argv[1:]
    job = {"device": device, "equality": equality, "memory": memory, "steps": steps, "speed": speed}[name]
    result = job(**json.loads(arguments))
    Path(file).write_text(json.dumps(dataclasses.asdict(result)), encoding="utf-8")


if __name__ == "__main__":
    main()
