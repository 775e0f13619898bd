import json
import os
import re
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from specmemo_jax.cli import plan
from specmemo_jax.cli.failures import OneLineErrors

app = typer.Typer(cls=OneLineErrors, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command("plan", cls=plan.PlanCommand, epilog=plan.EPILOG)(plan.plan)
app.callback()(lambda: None)


def run(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def planned(*arguments) -> dict:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


def refused(*arguments) -> dict:
    """The one object of a refusal."""
    result = run("--json", *arguments)
    assert result.exit_code == 3, result.output
    assert result.stderr == ""
    found = json.loads(result.stdout)
    assert list(found) == ["error", "least_budget_bytes"]
    return found


TITAN = ("llama-2-7b-chat", "--device", "titan-rtx")


def test_a_config_is_enough():
    found = planned(*TITAN)
    assert found["dtype"] == "float16"
    assert found["device"]["slug"] == "titan-rtx"
    assert found["peak_bytes"] <= found["device"]["memory_bytes"]
    assert found["terms"][0]["shape"] == [6738415616]
    assert planned("--model", *TITAN) == found


def test_table_is_plain_and_fits_100_columns():
    result = run(*TITAN)
    assert result.exit_code == 0
    assert result.stderr == ""
    assert "\x1b" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100
    for word in ("target weights", "share", "least budget", "lower bound", "tokens/s", "accepted length"):
        assert word in result.stdout


def test_options_reach_the_plan(tiny_model):
    found = planned(
        *(tiny_model, "--device", "a100-40", "--batch", 3, "--context", 200, "--prompt-tokens", 90),
        *("--new-tokens", 20, "--drafter", "ngram", "--tree-nodes", 4, "--dtype", "float32", "--mesh", 2),
    )
    assert found["workload"] == {"batch": 3, "prompt_tokens": 90, "new_tokens": 20, "context": 200}
    shapes = found["shapes"]
    assert (shapes["batch"], shapes["context"], shapes["tree_nodes"], shapes["shards"]) == (3, 200, 4, 2)
    assert (found["dtype"], found["drafter"]) == ("float32", "ngram")
    baseline = planned(tiny_model, "--device", "a100-40", "--policy", "unbounded", "--drafter", "ngram")
    assert baseline["policy"] == "unbounded"
    assert baseline["generation_bytes"] > found["generation_bytes"]


def test_at_the_least_budget_it_plans_and_one_byte_below_it_refuses(tiny_model):
    model = (tiny_model, "--device", "titan-rtx")
    least = planned(*model)["least_budget_bytes"]
    found = planned(*model, "--memory-budget", least)
    assert found["peak_bytes"] == least == found["least_budget_bytes"]
    assert refused(*model, "--memory-budget", least - 1)["least_budget_bytes"] == least
    result = run(*model, "--memory-budget", least - 1)
    assert result.exit_code == 3
    assert result.stdout == ""
    assert re.fullmatch(rf"specmemo: error: [^\n]*{least}[^\n]*\n", result.stderr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "abacus"), "no device 'abacus'"),
        (("--memory-budget", "0"), "must be positive"),
        (("--memory-budget", "-1"), "-1"),
        (("--memory-budget", "12 potatoes"), "12 potatoes"),
        (("--memory-budget", ""), "not understood"),
        (("--memory-budget", "1000GiB"), "more than"),
        (("--context", "4097"), "4096"),
        (("--context", "0"), "at least 1"),
        (("--batch", "0"), "at least 1"),
        (("--batch", "two"), "whole number"),
        (("--prompt-tokens", "4000", "--new-tokens", "97"), "4096"),
        (("--prompt-tokens", "-5"), "at least 1"),
        (("--new-tokens", "5.5"), "whole number"),
        (("--tree-nodes", "0"), "at least 1"),
        (("--mesh", "3"), "evenly"),
        (("--dtype", "bfloat16"), "has no bfloat16"),
        (("--dtype", "int3"), "int3"),
        (("--policy", "greedy"), "policy 'greedy'"),
        (("--drafter", "self:99"), "32 layers"),
        (("--drafter", "nobody"), "nobody"),
        (("--model", "other"), "one model"),
        (("--frontier", "f.pdf"), ".csv"),
        (("--measured", "m.csv"), "--frontier"),
        (("--frontier", "f.csv", "--measured", "no/such.csv"), "No such file"),
        (("--frontier", "no/such/folder/f.csv"), "No such file"),
        (("--bogus",), "--bogus"),
        (("--batch",), "--batch"),
        (("extra",), "extra"),
    ],
)
def test_refusals(arguments, message):
    found = refused(*TITAN, *arguments)
    assert message in found["error"]
    assert (found["least_budget_bytes"] is None) == (message != "more than")


def test_unknown_models_are_refused():
    for name in ("no-such-model", "", "org/not-pulled"):
        assert refused(name)["least_budget_bytes"] is None


def test_usage_errors_without_json_stay_typers():
    assert run(*TITAN, "--bogus").exit_code == 2


def test_frontier_is_written(tiny_model, tmp_path):
    file = tmp_path / "f.csv"
    found = planned(tiny_model, "--device", "t4", "--frontier", file)
    lines = file.read_text().splitlines()
    assert any(line.startswith(f"chosen,{found['peak_bytes']},") for line in lines)


def test_prove_has_the_compilers_word(tiny_model):
    arguments = (tiny_model, "--device", "cpu", "--context", 128, "--prompt-tokens", 32, "--new-tokens", 16)
    arguments = (*arguments, "--drafter", "none", "--dtype", "float32", "--prove")
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["compiled_for"], found["compiled_dtype"]) == ("cpu", "float32")
    assert found["compiled_generation_bytes"] <= found["generation_bytes"] <= found["peak_bytes"]
    assert "step 1, greedy" in [program["name"] for program in found["programs"]]
    assert "compiling step 1, greedy for cpu" in result.stderr
    text = run(*arguments).stdout
    assert "compiled for cpu, float32" in text


def test_no_backend_is_started_for_a_plan():
    script = (
        "from specmemo_jax.cli import plan\n"
        "assert 'jax' not in __import__('sys').modules\n"
        "plan.plan('llama-2-7b-chat', device='titan-rtx')\n"
        "from specmemo_jax.devices.probe import backend_started\n"
        "assert not backend_started()\n"
    )
    script = script.replace("device='titan-rtx'", "device='titan-rtx', memory_budget='20GiB'")
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=dict(os.environ), check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "llama-2-7b-chat" in done.stdout


def test_plan_of_request_tokens_lays_rows_out_in_groups():
    asked = ["llama-2-7b-chat", "--device", "a100-80", "--batch", "8", "--context", "2048", "--json"]
    whole, grouped = (
        json.loads(run(*asked, *more).stdout)
        for more in ([], ["--request-tokens", "300, 300,300,400,500,2000"])
    )
    assert whole["shapes"]["groups"] == []
    assert sum(rows for rows, _ in grouped["shapes"]["groups"]) == 8
    assert grouped["shapes"]["groups"][-1][1] == 2048
    assert grouped["peak_bytes"] < whole["peak_bytes"]
    refused = run("--request-tokens", "300,many")
    assert refused.exit_code == 3
    assert "'many' is not a whole number" in refused.stderr
