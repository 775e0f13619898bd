import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from specmemo_jax.cli.main import app
from specmemo_jax.errors import ConfigError
from specmemo_jax.train.data import Conversation, save_tokens
from specmemo_jax.train.run import Settings


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    rng = np.random.default_rng(0)
    file = tmp_path_factory.mktemp("data") / "chats.jsonl"
    with file.open("w") as out:
        for i in range(60):
            answer = "".join(rng.choice(list("abcd "), rng.integers(4, 20)))
            pair = [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": answer}]
            out.write(json.dumps({"messages": pair}) + "\n")
    return file


def command(target, data, out, *more):
    fixed = ["--data", data, "--length", 128, "--rows", 4, "--steps", 2, "--draft-vocab", 64]
    return [str(a) for a in ("train", "--target", target, "--out", out, *fixed, *more)]


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], prog_name="specmemo")


def test_train_writes_a_head_and_says_what_it_reached(tiny_model, chats, tmp_path):
    result = run(*command(tiny_model, chats, tmp_path, "--max-steps", 6))
    assert result.exit_code == 0, result.stderr
    assert "held-out acceptance" in result.stdout
    assert "conversations" in result.stderr
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["specmemo"]["training"]["steps_done"] == 6
    assert len(config["specmemo"]["training"]["acceptance"]) == 2
    assert load_file(tmp_path / "model.safetensors")["d2t"].shape == (64,)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 6
    again = run(*command(tiny_model, chats, tmp_path, "--max-steps", 6, "--lr", 1))
    assert again.exit_code == 1
    assert "rate=0.001" in again.stderr


def test_train_without_an_end_is_refused(tmp_path):
    result = run("train", "--out", tmp_path)
    assert result.exit_code == 2
    assert "--minutes" in result.stderr
    with pytest.raises(ConfigError, match="minutes"):
        Settings("eagle3", "tiny")


def test_train_leaves_a_model_in_its_folder_alone(tiny_model, chats, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    result = run(*command(tiny_model, chats, tmp_path, "--max-steps", 2))
    assert result.exit_code == 1
    assert "holds config.json, and no run of training; another folder would work" in result.stderr
    assert (tmp_path / "config.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"data": "none.jsonl"}, "no file none.jsonl"),
        ({"more": ("--taps", "40,41,42")}, "taps (40, 41, 42) of a target of 2 layers"),
        ({"more": ("--length", 9000)}, "rows of 9000 tokens for a target with a context of 256"),
    ],
)
def test_train_after_a_mistake_takes_the_same_folder(tiny_model, chats, tmp_path, wrong, said):
    more = ("--max-steps", 1)
    result = run(*command(tiny_model, wrong.get("data", chats), tmp_path, *more, *wrong.get("more", ())))
    assert result.exit_code == 1
    assert said in result.stderr
    assert not (tmp_path / "run.json").exists()


def test_train_refuses_tokens_of_another_target(tiny_model, tmp_path):
    save_tokens(tmp_path / "data.npz", [Conversation([1, 2, 70000, 3], [(2, 4)], 0)])
    result = run(*command(tiny_model, tmp_path / "data.npz", tmp_path / "out", "--max-steps", 1))
    assert result.exit_code == 1
    assert "holds token 70000, the target has" in result.stderr


def test_train_refuses_a_broken_file_of_tokens(tiny_model, tmp_path):
    save_tokens(tmp_path / "data.npz", [Conversation([1, 2, 3], [(1, 3)], 0)])
    content = (tmp_path / "data.npz").read_bytes()
    (tmp_path / "data.npz").write_bytes(content[: len(content) // 2])
    result = run(*command(tiny_model, tmp_path / "data.npz", tmp_path / "out", "--max-steps", 1))
    assert result.exit_code == 1
    assert "is no file of training tokens" in result.stderr


def test_train_goes_on_after_a_kill_to_the_same_weights(tiny_model, chats, tmp_path):
    # Each run is a process of its own: with other threads than these tests have, sums round otherwise.
    more = ("--max-steps", 24, "--save-every", 0, "--report-every", 1e9)
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def begin(out):
        line = [sys.executable, "-m", "specmemo_jax", *command(tiny_model, chats, out, *more)]
        return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    both = begin(whole), begin(killed)
    while both[1].poll() is None and not any(p.name.isdigit() for p in (killed / "checkpoints").glob("*")):
        time.sleep(0.01)
    both[1].send_signal(signal.SIGKILL)
    assert both[1].wait() == -signal.SIGKILL
    assert begin(killed).wait() == both[0].wait() == 0
    a, b = (load_file(folder / "model.safetensors") for folder in (whole, killed))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])
