"""Float32 token ids against a reference, for every drafter, tree and batch size; exit 1 on any difference.

    python scripts/check_equality.py                    # greedy, against the bundled MT-Bench reference
    python scripts/check_equality.py --sampled          # seeded, against this engine's plain decoding
    python scripts/check_equality.py --batches 2 8 --mixed --groups   # 1 to 64 tokens an answer; rows move
    python scripts/check_equality.py --batches 8 --positions          # what the caches hold, too
    python scripts/check_equality.py --reference FILE.jsonl --dtype bfloat16

A reference line holds ``prompt_ids`` and ``new_ids`` (here: transformers + torch, float32, 64 tokens).
``--sampled`` decodes each prompt once with each of the settings below, every request with a seed of its
own; the prompt's cache is kept from one setting to the next, as a chat's is. In bfloat16 and float16
near-ties may flip: the differing rows are counted and nothing fails.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from specmemo_jax import LLM, LlamaConfig, SamplingParams
from specmemo_jax.checkpoints import open_checkpoint, resolve
from specmemo_jax.checkpoints.zoo import zoo_config
from specmemo_jax.draft import Drafter, DraftModel, NgramDrafter, SelfDrafter, TreeShape, make_drafter
from specmemo_jax.draft.head_files import heads_for
from specmemo_jax.draft.load import open_head_drafter
from specmemo_jax.draft.ngram import chain
from specmemo_jax.engine.engine import Engine
from specmemo_jax.engine.request import Request
from specmemo_jax.llama.packing import pack
from specmemo_jax.testing import tiny_llama

ROUNDING = 1e-3  # of a layer's largest number; another token's differ by its size
REFERENCE = Path(__file__).parent.parent / "tests" / "data" / "mt_bench_reference.jsonl"
TOGETHER = {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1}
SETTINGS = {
    "temperature 0.7": {"temperature": 0.7},
    "temperature 1.0": {"temperature": 1.0},
    "top_p 0.9": {"top_p": 0.9},
    "top_k 40": {"top_k": 40},
    "min_p 0.05": {"min_p": 0.05},
    "repetition_penalty 1.1": {"repetition_penalty": 1.1},
    "together, 0.7": TOGETHER,
    "together, 1.0": {**TOGETHER, "temperature": 1.0},
}


def drafters(model: str) -> dict[str, Callable[[], Drafter | None]]:
    """What can be checked by name; draft models are made when asked for."""
    found: dict[str, Callable[[], Drafter | None]] = {"vanilla": lambda: None}
    for nodes in (4, 8, 16):
        found[f"ngram {nodes}"] = partial(make_drafter, "ngram", nodes)
        found[f"tree {nodes}"] = partial(NgramDrafter, nodes)
        found[f"self:6, {nodes}"] = partial(
            SelfDrafter, 6, TreeShape.of(nodes, *((1,) if nodes < 8 else (3, 4)))
        )
        found[f"itself, {nodes}"] = partial(
            _draft_model, model, TreeShape.of(nodes, *((1,) if nodes < 8 else (3, 4))), False
        )
        found[f"random model, {nodes}"] = partial(
            _draft_model, model, TreeShape.of(nodes, 2, -(-nodes // 2)), True
        )
    found["chain 8"] = partial(chain, 8)
    platform = jax.devices()[0].platform
    for head in heads_for(model):
        for shape in (TreeShape.of(4), TreeShape(8, 4, 2), TreeShape(16, 5, 4), TreeShape(64, 6, 10)):
            found[f"{head}, {shape.num_nodes}"] = partial(
                open_head_drafter, head, zoo_config(model), shape, jnp.dtype("float32"), platform
            )
    return found


def _draft_model(model: str, shape: TreeShape, random: bool) -> DraftModel:
    """The target itself as its draft, or a small Llama of random weights with its vocabulary."""
    checkpoint = open_checkpoint(resolve(model).path)
    config, tensors = checkpoint.config, checkpoint.tensors()
    if random:
        config = LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=64, ffn_size=128, num_layers=2, num_heads=2,
            num_kv_heads=1, head_dim=32, max_context=config.max_context,
        )  # fmt: skip
        tensors = tiny_llama(config, seed=1).items()
    return DraftModel.of(pack(config, tensors, jnp.dtype("float32")), shape)


class Positions:
    """Whether committed positions hold their row's tokens: live rows' keys and values, every 16 tokens,
    against those of a row that read the same ids alone.
    """

    def __init__(self, options: argparse.Namespace, longest: int):
        self._model = LLM(options.model, drafter=None, dtype=options.dtype, max_batch=1, max_context=longest)
        self._alone = self._model.engine
        self._seen: dict[int, tuple[Request, int]] = {}  # each log, and its tokens when it was last compared
        self.compared = self.wrong = 0

    def look(self, engine: Engine) -> None:
        """Compare the rows that have grown by 16 tokens since."""
        for row, log in enumerate(engine.rows):
            if log is None or log.num_cached < self._seen.get(id(log), (log, 0))[1] + 16:
                continue
            self._seen[id(log)] = log, log.num_cached
            self._alone.admit(0, Request(log.ids[: log.num_cached], 1))
            differs = np.zeros(log.num_cached, bool)
            for mine, fresh in zip(engine.committed(row), self._alone.committed(0), strict=True):
                for found, want in zip(mine, fresh, strict=True):
                    differs |= (np.abs(found - want) > ROUNDING * np.abs(want).max()).any(axis=(0, 2))
            self._alone.release(0)
            self.compared, self.wrong = self.compared + log.num_cached, self.wrong + int(differs.sum())

    def close(self) -> None:
        """Free the model that reads alone."""
        self._model.close()


def answers(
    options: argparse.Namespace,
    drafter: Drafter | None,
    batch: int,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
) -> tuple[list[list[int]], str, int]:
    """Every prompt's token ids, how they came, and how many committed positions are wrong."""
    longest = max(len(p) + (s.max_tokens or 0) for p, s in zip(prompts, params, strict=True))
    arguments = {"drafter": drafter, "dtype": options.dtype, "max_batch": batch, "max_context": longest}
    arguments["adaptive"] = False  # or a tree that loses would be left for plain decoding, and not be checked
    if options.groups:
        arguments["request_tokens"] = [
            len(p) + (s.max_tokens or 0) for p, s in zip(prompts, params, strict=True)
        ]
    positions = Positions(options, longest) if options.positions else None
    with LLM(options.model, **arguments) as llm, tqdm(total=len(prompts), disable=None, leave=False) as bar:
        jobs = [llm.job(*pair, place) for place, pair in enumerate(zip(prompts, params, strict=True))]
        for job in jobs:
            job.request.reuse = options.sampled
        with contextlib.closing(llm.run_jobs(jobs)) as running:
            for job in running:
                bar.update(job.output is not None)
                if positions is not None:
                    positions.look(llm.engine)
        outputs = [job.output for job in jobs if job.output is not None]
        moves = llm.engine.moved_rows
        laid = " + ".join(f"{rows} of {context}" for rows, context in llm.plan.shapes.groups)
    steps = sum(output.metrics.steps for output in outputs)
    tokens = sum(sum(output.metrics.accepted_lengths) for output in outputs)
    said = f"mean accepted length {tokens / max(steps, 1):.3f}"
    if laid:
        said += f", rows {laid}, {moves} moves"
    wrong = 0
    if positions is not None:
        positions.close()
        wrong = positions.wrong
        said += f", {positions.compared} positions compared, {wrong} wrong"
    return [list(output.outputs[0].token_ids) for output in outputs], said, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--reference", type=Path, default=REFERENCE)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--drafters", nargs="+", metavar="NAME", help="some of those that are printed")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--sampled", action="store_true", help="seeded settings against plain decoding")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens an answer")
    parser.add_argument("--mixed", action="store_true", help="answers of mixed lengths, up to --new-tokens")
    parser.add_argument(
        "--groups", action="store_true", help="rows in groups of fitting width, which they outgrow"
    )
    parser.add_argument(
        "--positions", action="store_true", help="compare live rows' caches with their ids read alone, too"
    )
    parser.add_argument("--limit", type=int, help="only the first rows of the reference")
    options = parser.parse_args()
    known = drafters(options.model)
    if unknown := set(options.drafters or ()) - known.keys():
        parser.error(f"no drafter {', '.join(map(repr, unknown))}; {', '.join(map(repr, known))} work")
    # Starts the backend: on a GPU its pool would be as large as the first plan, and plans differ.
    device = jax.devices()[0]
    print(f"{options.model} on {device.device_kind} ({device.platform}), jax {jax.__version__}", flush=True)
    rows = [json.loads(line) for line in options.reference.read_text().splitlines()][: options.limit]
    prompts = [row["prompt_ids"] for row in rows]

    def length(place: int) -> int:
        return 1 + place * 37 % options.new_tokens if options.mixed else options.new_tokens

    if options.sampled:
        every = list(product(range(len(prompts)), SETTINGS))
        params = [
            SamplingParams(seed=place, max_tokens=length(place), **SETTINGS[name])
            for place, (_, name) in enumerate(every)
        ]
        labels = [name for _, name in every]
        prompts = [prompts[row] for row, _ in every]
        want, _, failed = answers(options, None, 1, prompts, params)
    else:
        params = [SamplingParams(temperature=0, max_tokens=length(place)) for place in range(len(rows))]
        failed = 0
        labels, want = ["greedy"] * len(rows), [row["new_ids"][: length(i)] for i, row in enumerate(rows)]
    for batch in options.batches:
        for name in options.drafters or known:
            start = time.perf_counter()
            got, said, misplaced = answers(options, known[name](), batch, prompts, params)
            wrong = [i for i, pair in enumerate(zip(got, want, strict=True)) if pair[0] != pair[1]]
            print(
                f"{options.dtype} batch {batch} {name:<16} equal {len(prompts) - len(wrong)}/{len(prompts)}  "
                f"{said}  ({time.perf_counter() - start:.0f} s)",
                flush=True,
            )
            for i in wrong:
                at = next((k for k, (a, b) in enumerate(zip(got[i], want[i], strict=False)) if a != b), "end")
                row = i * len(rows) // len(prompts)
                print(f"    {labels[i]}, row {row} (seed {params[i].seed}): differs at token {at}")
            failed += len(wrong) + misplaced
    return int(failed > 0 and options.dtype == "float32")


if __name__ == "__main__":
    sys.exit(main())
