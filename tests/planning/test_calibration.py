import dataclasses
import json

import pytest
from some_calibration import MINE, some_calibration

from specmemo_jax.errors import ConfigError
from specmemo_jax.planning.calibration import (
    Calibration,
    config_hash,
    find_calibration,
    fingerprint,
)
from specmemo_jax.testing import TINY


def test_kept_and_found_under_its_fingerprint(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECMEMO_CACHE", str(tmp_path))
    assert find_calibration(MINE) is None
    path = some_calibration().save()
    assert path.parent == tmp_path / "calibration"
    assert find_calibration(MINE) == some_calibration()
    assert find_calibration(fingerprint("Other CPU", "org/tiny", TINY, "float32")) is None
    assert list(path.parent.iterdir()) == [path]


def test_other_fingerprints_are_refused(tmp_path):
    path = some_calibration().save(tmp_path / "kept.json")
    deeper = dataclasses.replace(TINY, num_layers=3)
    assert config_hash(deeper) != config_hash(TINY)
    for other, problem in (
        (fingerprint("Other CPU", "org/tiny", TINY, "float32"), "device 'Some CPU', not 'Other CPU'"),
        (fingerprint("Some CPU", "org/tiny", deeper, "float32"), "config_hash"),
        (fingerprint("Some CPU", "org/tiny", TINY, "bfloat16"), "dtype 'float32', not 'bfloat16'"),
        (dataclasses.replace(MINE, versions={"jax": "0"}), "versions"),
    ):
        assert other.path != MINE.path
        with pytest.raises(ConfigError, match=problem):
            Calibration.load(path, other)
    assert Calibration.load(path) == some_calibration()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"format": 0}, "format is 0"),
        ({"bandwidth": 0}, "bandwidth must be positive"),
        ({"flops": "fast"}, "flops must be a number"),
        ({"steps": []}, "needs steps of one row"),
        ({"steps": [{"batch": 0, "nodes": 1, "capacity": 1, "seconds": 1}]}, "batch must be at least 1"),
        ({"fingerprint": 3}, "fingerprint must be an object"),
    ],
)
def test_broken_files(tmp_path, change, problem):
    path = some_calibration().save(tmp_path / "kept.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=problem):
        Calibration.load(path)
