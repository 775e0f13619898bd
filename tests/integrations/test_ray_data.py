"""`Answers` over a local Ray with two workers: the rows and texts that one model alone gives."""

import json
import os
import runpy
import time
from pathlib import Path

import numpy as np
import pytest

from specmemo_jax import LLM, SamplingParams
from specmemo_jax.integrations.ray_data import Answers

EXAMPLE = Path(__file__).parents[2] / "scripts" / "examples" / "ray_batch.py"
PROMPTS = [f"question {n}: " + "ab " * (n % 7) for n in range(24)]
OPTIONS = {"max_batch": 2, "max_tokens": 10, "drafter": "ngram", "tree_nodes": 4, "max_context": 128}


@pytest.fixture(scope="module")
def alone(tiny_model):
    with LLM(tiny_model, drafter=None, max_context=128) as llm:
        greedy = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=10))
        yield [output.outputs[0] for output in greedy]


def test_a_batch_of_every_kind(tiny_model, alone):
    """Without Ray: texts, ids, messages, missing cells, rows that cannot be answered."""
    answers = Answers(str(tiny_model), keep=("label",), **OPTIONS)
    said = answers({"prompt": np.array(PROMPTS[:5]), "label": np.arange(5)})
    assert said["text"].tolist() == [answer.text for answer in alone[:5]]
    assert [tuple(ids) for ids in said["token_ids"]] == [answer.token_ids for answer in alone[:5]]
    assert said["label"].tolist() == list(range(5))
    assert set(said["error"]) == {""}
    ids = [answers.llm.prompt_ids(text, 0) for text in PROMPTS[:2]]
    column = np.empty(4, object)
    column[:] = [np.array(ids[0]), PROMPTS[1], "", "x" * 300]
    limits = np.array([np.nan, 3.0, 3.0, np.nan])
    said = answers({"prompt": column, "max_tokens": np.array([None, 3, 3, None], object), "seed": limits * 0})
    assert said["text"][0] == alone[0].text
    assert tuple(said["token_ids"][1]) == alone[1].token_ids[:3]
    assert "empty" in said["error"][2]
    assert "context holds 128" in said["error"][3]
    assert said["finish_reason"].tolist()[2:] == ["", ""]
    assert answers({}) == {} or not any(len(column) for column in answers({}).values())
    # A seed by what a row holds: the same whoever sits beside.
    sampled = Answers(str(tiny_model), temperature=1.0, seed=5, **OPTIONS)
    whole = sampled({"prompt": np.array(PROMPTS[:6])})["text"].tolist()
    assert sampled({"prompt": np.array(PROMPTS[3:6])})["text"].tolist() == whole[3:]
    assert len(set(whole)) == 6


@pytest.mark.filterwarnings("ignore")  # of Ray's own making
def test_two_workers(tiny_model, alone, tmp_path):
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    pytest.importorskip("ray.data", reason="the extra ray is not installed")
    requests = tmp_path / "requests.jsonl"
    rows = [{"custom_id": str(n), "prompt": prompt} for n, prompt in enumerate(PROMPTS)]
    rows.append({"custom_id": "bad", "prompt": "x" * 300})
    requests.write_text("".join(json.dumps(row) + "\n" for row in rows))

    class Here(Answers):
        def __call__(self, batch):
            time.sleep(0.3)  # so that one worker does not do it all before the other has the model
            return {**super().__call__(batch), "worker": np.full(len(batch["prompt"]), os.getpid())}

    # A CPU for each worker and some for reading the file.
    ray.init(num_cpus=4, include_dashboard=False, configure_logging=False, log_to_driver=False)
    try:
        data = ray.data.read_json(str(requests), override_num_blocks=6).map_batches(
            Here, fn_constructor_kwargs={"model": str(tiny_model), **OPTIONS}, batch_size=4, concurrency=2
        )
        found = {row["custom_id"]: row for row in data.take_all()}
        runpy.run_path(str(EXAMPLE))["main"](
            [
                str(requests),
                str(tmp_path / "out"),
                "--model",
                str(tiny_model),
                "--max-tokens",
                "10",
                "--workers",
                "1",
            ]
        )
    finally:
        ray.shutdown()
    assert found.keys() == {row["custom_id"] for row in rows}
    assert [found[str(n)]["text"] for n in range(len(PROMPTS))] == [answer.text for answer in alone]
    assert "context holds 128" in found["bad"]["error"]
    written = [json.loads(line) for file in (tmp_path / "out").iterdir() for line in file.open()]
    assert {row["custom_id"]: row["text"] for row in written} == {
        key: row["text"] for key, row in found.items()
    }
    assert len({row["worker"] for row in found.values()}) == 2
