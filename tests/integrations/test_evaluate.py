"""lm-eval over a tiny model and tiny tasks made here: its figures are those of the logits."""

import json

import numpy as np
import pytest

from specmemo_jax import LLM, SamplingParams
from specmemo_jax.errors import RequestError
from specmemo_jax.testing import TINY, tiny_llama, tiny_tokenizer

lm_eval = pytest.importorskip("lm_eval", reason="the extra eval is not installed")

CHOICES = ["the end", "a ba", "no no no"]
QUESTIONS = ["ab ab abab", "stop and the", "of " * 29 + "of", "in an on"]


@pytest.fixture(scope="module")
def llm():
    with LLM(TINY, tiny_llama(), drafter="ngram", max_batch=2, scoring=True) as llm:
        llm.tokenizer = tiny_tokenizer()
        yield llm


@pytest.fixture(scope="module")
def model(llm):
    from specmemo_jax.integrations.evaluate import SpecMemoLM

    return SpecMemoLM(llm)


def likelihood(llm, context, continuation):
    ids, begin = llm.tokenizer.encode(context + continuation), len(llm.tokenizer.encode(context))
    scores, likeliest = llm.log_likelihoods(ids, begin)
    return scores.sum(), likeliest.all()


def task(folder, name, rows, **fields):
    """A task over ``rows``, read from a file as any data set on disk."""
    file = folder / f"{name}.json"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"data_files": {"test": str(file)}, "cache_dir": str(folder / "cache")}
    return {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test", **fields}


@pytest.mark.filterwarnings("ignore")  # of the harness' own making
def test_a_task_of_choices_and_one_of_answers(llm, model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    right = [int(np.argmax([likelihood(llm, q, " " + c)[0] for c in CHOICES])) for q in QUESTIONS]
    labels = [*right[:3], (right[3] + 1) % 3]  # three of four
    params = SamplingParams(temperature=0, max_tokens=12)
    answers = [llm.generate(q, params)[0].outputs[0].text for q in QUESTIONS]
    tasks = [
        task(
            tmp_path,
            "tiny_choices",
            [{"question": q, "label": label} for q, label in zip(QUESTIONS, labels, strict=True)],
            output_type="multiple_choice",
            doc_to_text="{{question}}",
            doc_to_choice=CHOICES,
            doc_to_target="label",
            metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        ),
        task(
            tmp_path,
            "tiny_answers",
            [{"question": q, "answer": a} for q, a in zip(QUESTIONS, answers, strict=True)],
            output_type="generate_until",
            doc_to_text="{{question}}",
            doc_to_target="{{answer}}",
            generation_kwargs={"until": ["\x00"], "max_gen_toks": 12, "do_sample": False},
            metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        ),
    ]
    found = lm_eval.simple_evaluate(
        model=model, tasks=tasks, num_fewshot=0, bootstrap_iters=0, log_samples=False
    )
    assert found is not None
    assert found["results"]["tiny_choices"]["acc,none"] == 0.75
    assert found["results"]["tiny_answers"]["exact_match,none"] == 1.0


def test_likelihoods_are_the_logits(llm, model):
    from lm_eval.api.instance import Instance

    pairs = [(q, " " + c) for q in QUESTIONS for c in CHOICES]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    for pair, (score, greedy) in zip(pairs, model.loglikelihood(requests, disable_tqdm=True), strict=True):
        want, likeliest = likelihood(llm, *pair)
        assert score == pytest.approx(want, abs=1e-3)
        assert greedy == likeliest


def test_whole_texts_in_windows(llm, model):
    from lm_eval.api.instance import Instance

    def rolled(text):
        instance = Instance("loglikelihood_rolling", {}, (text,), 0)
        (found,) = model.loglikelihood_rolling([instance], disable_tqdm=True)
        return found

    scores, _ = llm.log_likelihoods([model.prefix_token_id, *llm.tokenizer.encode("ab and the")])
    assert rolled("ab and the") == pytest.approx(scores.sum(), abs=1e-3)
    text = "ab and the " * 40
    ids, window = llm.tokenizer.encode(text), llm.plan.context - 1
    assert window < len(ids) < 2 * window
    first, _ = llm.log_likelihoods([model.prefix_token_id, *ids[:window]])
    rest = ids[-window - 1 :]  # the last window has all the context that fits
    second, _ = llm.log_likelihoods(rest, window + 1 - (len(ids) - window))
    assert rolled(text) == pytest.approx(first.sum() + second.sum(), abs=1e-3)


def test_what_it_cannot_evaluate():
    from specmemo_jax.integrations.evaluate import SpecMemoLM

    with LLM(TINY, tiny_llama(), drafter=None) as plain:
        with pytest.raises(RequestError, match="tokenizer"):
            SpecMemoLM(plain)
        plain.tokenizer = tiny_tokenizer()
        with pytest.raises(RequestError, match="scoring=True"):
            SpecMemoLM(plain)
