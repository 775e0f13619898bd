"""The quick start's main job, inside .venv: vanilla and speculative answers, side by side."""

import argparse
import dataclasses
import resource
import sys
from pathlib import Path

import jax

from specmemo_jax import LLM, RequestOutput, SamplingParams
from specmemo_jax.cli.answers import answer
from specmemo_jax.files.prompts import PromptRecord, read_prompts


@dataclasses.dataclass(frozen=True)
class Run:
    """What one way of decoding gave; memory in bytes."""

    name: str
    answers: dict[tuple[str | int, int], RequestOutput]
    peak_bytes: int
    generation_bytes: int
    process_bytes: int

    @property
    def tokens_per_second(self) -> float:
        """Tokens after each answer's first, over the time that they took."""
        metrics = [output.metrics for output in self.answers.values()]
        return sum(sum(m.accepted_lengths) for m in metrics) / max(sum(m.decode_s for m in metrics), 1e-9)

    @property
    def mean_accepted_length(self) -> float:
        """Tokens a target pass, over all answers."""
        metrics = [output.metrics for output in self.answers.values()]
        return sum(sum(m.accepted_lengths) for m in metrics) / max(sum(m.steps for m in metrics), 1)

    def token_ids(self, key: tuple[str | int, int]) -> tuple[int, ...]:
        """The answer's ids."""
        return self.answers[key].outputs[0].token_ids


def compare(options: argparse.Namespace) -> bool:
    """Answer the prompts both ways, print the answers and the figures; whether all token ids are equal."""
    records = read_prompts(options.prompts)
    print(f"{options.model}, float32 on {jax.devices()[0].device_kind}, greedy, batch 1", flush=True)
    vanilla, drafted = (_run(name, records, options) for name in (None, "ngram"))
    equal = [vanilla.token_ids(key) == drafted.token_ids(key) for key in vanilla.answers]
    for (id_, turn), output in drafted.answers.items():
        plain, metrics = vanilla.answers[id_, turn].metrics, output.metrics
        print(
            f"\n[{id_}{f', turn {turn}' if turn > 1 else ''}: {len(output.outputs[0].token_ids)} tokens, "
            f"{metrics.mean_accepted_length:.2f} a step; {plain.tokens_per_second:.1f} tokens/s plain, "
            f"{metrics.tokens_per_second:.1f} drafted]\n{output.outputs[0].text.strip()}"
        )
    print(f"\n{'':<26}{vanilla.name:>12}{drafted.name:>12}")
    for name, unit, digits in (
        ("tokens_per_second", 1, 1),
        ("mean_accepted_length", 1, 2),
        ("peak_bytes", 2**20, 1),
        ("generation_bytes", 2**20, 1),
        ("process_bytes", 2**20, 1),
    ):
        label = name.replace("_per_", "/").replace("_bytes", " memory, MiB").replace("_", " ")
        values = "".join(f"{getattr(run, name) / unit:>12.{digits}f}" for run in (vanilla, drafted))
        ratio = f"   {drafted.tokens_per_second / vanilla.tokens_per_second:.2f}x" if "second" in name else ""
        print(f"{label:<26}{values}{ratio}")
    print(f"token ids equal in {sum(equal)} of {len(equal)} answers" + ("" if all(equal) else ": NOT EXACT"))
    return all(equal)


def _run(drafter: str | None, records: list[PromptRecord], options: argparse.Namespace) -> Run:
    answers = {}
    params = SamplingParams(temperature=0, max_tokens=options.max_tokens)
    with LLM(
        options.model,
        drafter=drafter,
        tree_nodes=options.tree_nodes if drafter else None,
        dtype="float32",
        max_context=options.max_context,
    ) as llm:
        # Once unmeasured: programs are compiled when first needed, or read from the cache.
        answer(llm, records, params, lambda _: None)
        answer(llm, records, params, lambda a: answers.update({(a.record.id, a.turn): a.output}))
        return Run(
            drafter or "vanilla", answers, llm.plan.peak_bytes, llm.plan.generation_bytes, _process_bytes()
        )


def _process_bytes() -> int:
    """Resident memory of this process now; where the system does not tell, the most it has had."""
    status = Path("/proc/self/status")
    if status.exists():
        resident = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
        return int(resident.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
