import json

import jax.numpy as jnp
import pytest
import typer

from specmemo_jax.checkpoints.open import open_model
from specmemo_jax.cli.calibrate import calibrate as command
from specmemo_jax.draft import Drafter, NgramDrafter, SelfDrafter, TreeShape
from specmemo_jax.errors import ConfigError, RequestError
from specmemo_jax.llama.packing import pack
from specmemo_jax.measure import run as front
from specmemo_jax.measure.timing import Grid
from specmemo_jax.planning import request as planning
from specmemo_jax.planning.calibration import find_calibration
from specmemo_jax.planning.speed import calibrated
from specmemo_jax.testing import TINY, tiny_llama

OPENED = open_model(TINY, tiny_llama())
TARGET = pack(TINY, iter(tiny_llama().items()), jnp.dtype("float32"))
GRID = Grid(
    nodes=(1, 4), few_nodes=(1,), capacities=(256, 512), batches=(1, 2), rounds=1, repeats=1,
    probe_bytes=2**16, probe_size=64,
)  # fmt: skip
SELF = SelfDrafter(1, TreeShape(4, 3))


def setup(drafter: Drafter | None = SELF) -> front.Setup:
    return front.Setup(OPENED, TARGET, drafter)


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_what_is_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECMEMO_CACHE", str(tmp_path))
    said = []
    found = front.calibrate(setup(), GRID, said.append)
    # 512 slots are more than the model's context
    assert [(p.batch, p.nodes, p.capacity) for p in found.steps] == [(1, 1, 256), (1, 4, 256), (2, 1, 256)]
    assert [p.chunk for p in found.prefills] == [32, 64, 128]
    assert [(p.drafter, p.nodes) for p in found.drafts] == [("self:1", 4)]
    assert found.drafts[0].work == SELF.work(TINY, 4, 1, 256)
    assert min(found.bandwidth, found.flops, *(p.seconds for p in found.steps)) > 0
    assert any("round 1 of 1" in text for text in said)
    found.save()
    assert find_calibration(setup().fingerprint) == found
    speed = calibrated(found)
    assert speed.step_seconds(TINY, "float32", 1, 2, 256) >= speed.step_seconds(TINY, "float32", 1, 1, 256)


def test_a_profile_from_prompts(tmp_path):
    file = lines(tmp_path / "p.jsonl", {"prompt": [3, 4, 5]}, {"prompt": [9, 8, 7, 6]}, {"prompt": [1]})
    seen = []
    found = front.profile(setup(), file, max_tokens=12, limit=2, progress=lambda: seen.append(1))
    assert len(seen) == 2
    assert (found.drafter, found.model, found.prompts) == ("self:1", "params", "p.jsonl")
    assert found.measured(4, 3, 1) is not None
    ngram = front.profile(setup(NgramDrafter(4)), file, max_tokens=12)
    assert ngram.drafter == "ngram"
    assert len(ngram.shapes) > 1


def test_a_profile_from_known_answers(tmp_path):
    file = lines(tmp_path / "k.jsonl", {"prompt_ids": [3, 4, 3, 4], "new_ids": [3, 4, 3, 4, 3]})
    found = front.profile(setup(NgramDrafter(4)), file)
    shape = found.measured(4, 3, 1)
    assert shape is not None
    assert (shape.steps, shape.expected_acceptance.accepted_length) == (1, 4)
    running = front.profile(setup(), file)  # another drafter answers the prompts itself
    assert running.steps >= 2


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt_ids": [1], "new_ids": []}, "record 1.*lists of token ids"),
        ({"prompt_ids": [1]}, "record 1.*lists of token ids"),
        ({"prompt": [1] * 300}, "300 tokens and 8 new ones, the context holds 256"),
        ({"prompt": "text"}, "which texts need; token ids would work"),
        ({"answer": 1}, "one of prompt, messages, turns"),
    ],
)
def test_prompts_that_do_not_work(tmp_path, row, problem):
    file = lines(tmp_path / "p.jsonl", row)
    with pytest.raises(RequestError, match=problem):
        front.profile(setup(), file, max_tokens=8)


def test_no_drafter_and_no_file(tmp_path):
    with pytest.raises(ConfigError, match="needs a drafter"):
        front.profile(setup(None), tmp_path / "none.jsonl")
    with pytest.raises(RequestError, match=r"none\.jsonl"):
        front.check_prompts(tmp_path / "none.jsonl")


def test_profiles_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECMEMO_CACHE", str(tmp_path))
    zoo = planning.stored_profile("smollm2-135m-instruct", "ngram")
    assert zoo is not None
    assert zoo.model == "smollm2-135m-instruct"
    assert planning.stored_profile("smollm2-135m-instruct", "self:3") is None
    assert planning.stored_profile("params", "self:1") is None
    file = lines(tmp_path / "k.jsonl", {"prompt_ids": [3, 4], "new_ids": [3, 4, 3]})
    front.profile(setup(), file).save(front.profile_path(setup()))
    mine = planning.stored_profile("params", "self:1")
    assert mine is not None
    assert mine.prompts == "k.jsonl"


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SPECMEMO_CACHE", str(tmp_path))
    monkeypatch.setattr(front, "open_setup", lambda *names: setup())
    monkeypatch.setattr(front, "Grid", lambda: GRID)
    file = lines(tmp_path / "k.jsonl", {"prompt_ids": [3, 4], "new_ids": [3, 4, 3]})
    command(drafter="self:1", prompts_file=str(file), output=str(tmp_path / "out.json"))
    printed = capsys.readouterr().out
    assert "bandwidth" in printed
    assert str(setup().fingerprint.path) in printed
    assert "tokens a step" in printed
    assert (tmp_path / "out.json").is_file()
    with pytest.raises(typer.BadParameter, match="--prompts FILE"):
        command(output="x")
    with pytest.raises(typer.BadParameter, match="nothing to accept"):
        command(prompts_file=str(file), drafter="none")
