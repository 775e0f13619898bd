import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from specmemo_jax import LLM, SamplingParams
from specmemo_jax.cli.main import app

FIELDS = [
    "id", "line", "turn", "text", "token_ids", "finish_reason", "stop_reason", "seed", "prompt_tokens",
    "steps", "accepted_lengths", "mean_accepted_length", "tokens_per_second", "time_to_first_token_s",
]  # fmt: skip


def run(model, *arguments, stdin: str | None = None):
    command = ["generate", "--model", str(model), "--max-context", "256", *map(str, arguments)]
    return CliRunner().invoke(app, command, input=stdin)


def rows(result) -> list[dict]:
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    return [json.loads(line) for line in result.stdout.splitlines()]


def failure(result) -> str:
    assert result.exit_code == 1, result.stdout
    assert result.stderr.startswith("specmemo: error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def jsonl(path: Path, *records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_plain_decoding_accepts_one_token_a_step(tiny_model):
    (plain,) = rows(run(tiny_model, "hello", "--drafter", "none", "--max-tokens", 5))
    assert set(plain["accepted_lengths"]) == {1}
    (drafted,) = rows(run(tiny_model, "hello", "--max-tokens", 5))
    assert drafted["token_ids"] == plain["token_ids"]


def test_arguments_are_chat_messages_and_raw_texts_are_not(tiny_model):
    (chat,) = rows(run(tiny_model, "hello", "--max-tokens", 5))
    assert list(chat) == FIELDS
    assert chat["prompt_tokens"] > len("hello")
    assert (chat["id"], chat["line"], chat["turn"]) == (1, None, 1)
    assert len(chat["token_ids"]) <= 5
    assert sum(chat["accepted_lengths"]) == len(chat["token_ids"]) - 1
    (raw,) = rows(run(tiny_model, "hello", "--raw", "--max-tokens", 5))
    assert raw["prompt_tokens"] == len("hello")


def test_turns_continue_the_same_ids(tiny_model, tmp_path):
    turns = ["one two one two", "more", "and more"]
    file = jsonl(
        tmp_path / "q.jsonl",
        {"question_id": 81, "category": "c", "turns": turns},
        {"prompt": [5, 6, 5, 6, 5]},
    )
    out = rows(run(tiny_model, "--prompts", file, "--max-tokens", 8, "--max-batch", 2))
    assert {(a["id"], a["turn"]) for a in out} == {(81, 1), (81, 2), (81, 3), (2, 1)}
    asked = sorted((a for a in out if a["id"] == 81), key=lambda a: a["turn"])
    assert [a["question_id"] for a in asked] == [81] * 3
    with LLM(str(tiny_model), drafter=None, max_context=256) as llm:
        assert llm.tokenizer is not None
        ids = llm.tokenizer.chat_ids([{"role": "user", "content": turns[0]}])
        messages = [{"role": "user", "content": turns[0]}]
        for answer, text in zip(asked, [*turns[1:], None], strict=True):
            assert answer["prompt_tokens"] == len(ids)
            (expected,) = llm.generate([ids], SamplingParams(temperature=0, max_tokens=8))
            assert answer["token_ids"] == list(expected.outputs[0].token_ids)
            if text is not None:
                kept = answer["token_ids"]
                kept = kept[:-1] if kept[-1] in llm.eos_ids else kept
                messages += [
                    {"role": "assistant", "content": answer["text"]},
                    {"role": "user", "content": text},
                ]
                ids = ids + kept + llm.tokenizer.next_turn_ids(messages)


def test_output_file_limit_and_standard_input(tiny_model, tmp_path):
    output = tmp_path / "out.jsonl"
    lines = (
        '{"prompt": "a"}\n\n{"messages": [{"role": "user", "content": "b"}], "id": "m"}\n{"prompt": "c"}\n'
    )
    result = run(tiny_model, "-p", "-", "-n", 3, "--limit", 2, "-o", output, stdin=lines)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(a["id"], a["line"]) for a in written] == [(1, 1), ("m", 3)]


def test_text_format(tiny_model):
    result = run(tiny_model, "a", "b", "--format", "text", "-n", 4)
    assert result.exit_code == 0
    assert result.stdout.count("--- ") == 2
    assert result.stdout.count("tokens/s") == 2


def test_stops(tiny_model):
    (free,) = rows(run(tiny_model, "abc", "--ignore-eos", "-n", 12))
    assert free["finish_reason"] == "length"
    stop = free["token_ids"][3]
    (stopped,) = rows(run(tiny_model, "abc", "--ignore-eos", "-n", 12, "--stop-token-id", stop))
    assert stopped["finish_reason"] == "stop"
    assert stopped["token_ids"] == free["token_ids"][: free["token_ids"].index(stop) + 1]
    assert (free["stop_reason"], stopped["stop_reason"]) == (None, stop)


def test_stop_strings_and_the_turn_after_one(tiny_model, tmp_path):
    file = jsonl(tmp_path / "q.jsonl", {"turns": ["abc", "more"]})
    arguments = ("-p", file, "--ignore-eos", "-n", 12)
    free, _ = rows(run(tiny_model, *arguments))
    stop = free["text"][4:6]
    cut, after = rows(run(tiny_model, *arguments, "--stop", stop))
    assert (cut["finish_reason"], cut["stop_reason"]) == ("stop", stop)
    assert cut["text"] == free["text"][: free["text"].index(stop)]
    with LLM(str(tiny_model), drafter=None, max_context=256) as llm:
        assert llm.tokenizer is not None
        said = [("user", "abc"), ("assistant", cut["text"]), ("user", "more")]
        ids = llm.tokenizer.chat_ids([{"role": role, "content": text} for role, text in said])
    assert after["prompt_tokens"] == len(ids)  # the stop string was read, but not said


def test_seeds_differ_by_answer_repeat_by_run_and_stand_in_the_row(tiny_model, tmp_path):
    file = jsonl(tmp_path / "q.jsonl", *[{"prompt": "a"}] * 3)
    arguments = ("-n", 12, "--temperature", 1, "--ignore-eos")
    first, second = (rows(run(tiny_model, "-p", file, *arguments, "--seed", 5)) for _ in range(2))
    assert [answer["seed"] for answer in first] == [5, 6, 7]
    assert [answer["token_ids"] for answer in first] == [answer["token_ids"] for answer in second]
    assert len({tuple(answer["token_ids"]) for answer in first}) == 3
    (alone,) = rows(run(tiny_model, "a", *arguments, "--seed", 6))
    assert alone["token_ids"] == first[1]["token_ids"]
    (unseeded,) = rows(run(tiny_model, "a", *arguments))
    (repeated,) = rows(run(tiny_model, "a", *arguments, "--seed", unseeded["seed"]))
    assert repeated["token_ids"] == unseeded["token_ids"]


def test_a_lines_own_parameters(tiny_model, tmp_path):
    file = jsonl(
        tmp_path / "q.jsonl",
        {"prompt": "a", "params": {"temperature": 0.9, "seed": 41, "max_tokens": 2}},
        {"prompt": "a"},
    )
    answers = rows(run(tiny_model, "-p", file, "-n", 4, "--ignore-eos"))
    assert [answer["seed"] for answer in answers] == [41, None]
    assert [len(answer["token_ids"]) for answer in answers] == [2, 4]


def test_a_text_file_and_a_pipe_are_prompts(tiny_model, tmp_path):
    (tmp_path / "a.txt").write_text("hello\n")
    (argument,) = rows(run(tiny_model, "hello", "-n", 4))
    (file,) = rows(run(tiny_model, "-f", tmp_path / "a.txt", "-n", 4))
    (pipe,) = rows(run(tiny_model, "-n", 4, stdin="hello\n"))
    assert argument["token_ids"] == file["token_ids"] == pipe["token_ids"]
    assert (file["id"], pipe["id"]) == (str(tmp_path / "a.txt"), 1)


def test_every_sampling_option_arrives(tiny_model, monkeypatch):
    seen = []
    monkeypatch.setattr("specmemo_jax.llm.LLM", lambda *_, **__: nullcontext())
    monkeypatch.setattr(
        "specmemo_jax.cli.answers.answer", lambda llm, records, params, emit, chat: seen.extend(params)
    )
    command = (
        "a --temperature 0.5 --top-p 0.9 --top-k 7 --min-p 0.1 --repetition-penalty 1.2 "
        "--presence-penalty 0.3 --frequency-penalty 0.4 --seed 9 --max-tokens 30 --min-tokens 2 "
        "--stop x --stop y --stop-token-id 5 --bad-word z --ignore-eos"
    )
    assert rows(run(tiny_model, *command.split())) == []
    assert seen == [
        (
            SamplingParams(
                temperature=0.5,
                top_p=0.9,
                top_k=7,
                min_p=0.1,
                repetition_penalty=1.2,
                presence_penalty=0.3,
                frequency_penalty=0.4,
                seed=9,
                max_tokens=30,
                min_tokens=2,
                stop=("x", "y"),
                stop_token_ids=(5,),
                bad_words=("z",),
                ignore_eos=True,
            ),
        )
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ["a", "--prompts", "b"],
        ["a", "--file", "b"],
        ["a", "--top-p", "0", "--temperature", "1"],
        ["a", "--min-tokens", "300"],
        ["a", "--stop", ""],
        ["a", "--seed", "1"],
        ["a", "--stream", "--format", "jsonl"],
        ["a", "--stream", "--max-batch", "2"],
        ["a", "--stream", "--output", "b"],
        ["a", "--max-tokens", "0"],
        ["a", "--dtype", "int3"],
        ["a", "--format", "xml"],
    ],
)
def test_usage_errors(arguments):
    result = run("none", *arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "standard input: the prompt is empty"),
        (["-f", "none.txt"], "none.txt: No such file or directory"),
        ([""], "prompt 1: the prompt is empty"),
        (["x" * 300], "this one holds 256"),
        (["a", "-n", "400"], "a smaller --max-tokens works"),
        (["a", "--max-context", "64"], "or a larger --max-context works"),
        (["a", "--max-context", "999999"], "exceeds the model's 256"),
        (["a", "--drafter", "crystal-ball"], "'crystal-ball'"),
        (["a", "--memory-budget", "much"], "much"),
        (["a", "--memory-budget", "1KiB"], "would work"),
        (["a", "--tree-nodes", "1"], "at least 2 tree nodes"),
        (["--prompts", "none.jsonl"], "none.jsonl: No such file or directory"),
        (["a", "-n", "2", "--output", "/dev/full"], "cannot write to /dev/full: No space left on device"),
        (["a", "--output", "no/such/folder/out"], "cannot write no/such/folder/out"),
    ],
)
def test_requests_that_cannot_be_served(tiny_model, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in failure(run(tiny_model, *arguments))


def test_ids_outside_the_vocabulary_are_named_with_their_line(tiny_model, tmp_path):
    file = jsonl(tmp_path / "q.jsonl", {"prompt": [1, 2]}, {"prompt": [1, 260]})
    text = failure(run(tiny_model, "-p", file, "-n", 2))
    assert "q.jsonl, line 2: token id 260 is outside the vocabulary; ids from 0 to 259 work" in text


def test_later_turns_are_checked_before_the_first_answer(tiny_model, tmp_path):
    file = jsonl(tmp_path / "q.jsonl", {"prompt": "a"}, {"turns": ["a", "b" * 200]})
    result = run(tiny_model, "-p", file, "-n", 20)
    assert "q.jsonl, line 2: " in failure(result)
    assert result.stdout == ""


def test_a_malformed_line_is_told_before_the_model_is_looked_for(tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt"\n')
    assert "q.jsonl, line 2: not JSON" in failure(run("no-such-model", "-p", file))
    jsonl(file, {"prompt": "a"}, {"prompt": "b", "params": {"top_k": 0.5}})
    assert "q.jsonl, line 2: top_k must be" in failure(run("no-such-model", "-p", file))


def test_turns_without_a_limit_are_refused(tiny_model, tmp_path):
    file = jsonl(tmp_path / "q.jsonl", {"turns": ["a", "b"], "params": {"max_tokens": None}})
    assert "q.jsonl, line 1: 2 turns with max_tokens null" in failure(run(tiny_model, "-p", file))


def test_the_prompts_are_not_overwritten(tiny_model, tmp_path):
    file = jsonl(tmp_path / "q.jsonl", {"prompt": "a"})
    assert run(tiny_model, "-p", file, "-o", file).exit_code == 2
    assert file.read_text()


def test_unknown_and_config_only_models():
    assert "no model 'no-such-model'" in failure(run("no-such-model", "a"))
    assert "by its config only" in failure(run("llama-2-7b-chat", "a"))


def test_a_model_without_tokenizer_takes_ids(broken_model, tmp_path):
    for file in broken_model.glob("token*"):
        file.unlink()
    (answer,) = rows(run(broken_model, "-p", jsonl(tmp_path / "q.jsonl", {"prompt": [7, 8, 9]}), "-n", 3))
    assert answer["text"] == ""
    assert "has no tokenizer" in failure(run(broken_model, "a"))


def test_chats_need_a_template(broken_model, tmp_path):
    (broken_model / "chat_template.jinja").unlink()
    (answer,) = rows(run(broken_model, "ab", "-n", 2))
    assert answer["prompt_tokens"] == 2
    file = jsonl(tmp_path / "q.jsonl", {"turns": ["a"]})
    assert "q.jsonl, line 1: this model has no chat template" in failure(run(broken_model, "-p", file))
    assert "cannot be put --raw" in failure(run(broken_model, "-p", file, "--raw"))


def damage_truncated(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def damage_missing_shard(folder: Path) -> None:
    shutil.move(folder / "model.safetensors", folder / "gone")
    names = load_file(folder / "gone")
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def damage_shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.norm.weight": np.ones(31, np.float32)}, folder / "model.safetensors")


def damage_nan(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    save_file(tensors, folder / "model.safetensors")


def damage_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncated, "model.safetensors"),
        (damage_missing_shard, "model-00001-of-00001.safetensors"),
        (damage_shape, "norm.weight"),
        (damage_nan, "layers.1.mlp.up_proj.weight"),
        (damage_config, "relu"),
    ],
)
def test_damaged_models_are_refused_by_file_and_tensor(broken_model, damage, message):
    damage(broken_model)
    assert message in failure(run(broken_model, "a"))


def test_answers_before_an_interruption_stay(tiny_model, tmp_path, monkeypatch):
    output = tmp_path / "out.jsonl"
    file = jsonl(tmp_path / "q.jsonl", {"prompt": "a"}, {"prompt": "b"})
    from specmemo_jax.engine.engine import Engine

    admit = Engine.admit

    def interrupted(self, row, prompt, *rest):
        if output.read_text():
            raise KeyboardInterrupt
        return admit(self, row, prompt, *rest)

    monkeypatch.setattr(Engine, "admit", interrupted)
    result = run(tiny_model, "-p", file, "-o", output, "-n", 3)
    assert result.exit_code == 130
    assert result.stderr == "specmemo: interrupted\n"
    assert len(output.read_text().splitlines()) == 1
