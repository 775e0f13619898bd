"""A CUDA plugin on a machine without CUDA says nothing."""

import os
import subprocess
import sys

import pytest

# As the real one: it refuses to start without CUDA, unless it is told not to look.
PLUGIN = """
import os
def initialize():
    os.write(2, b"WARNING: All log messages before absl::InitializeLog() is called are written to STDERR\\n")
    if os.environ.get("JAX_SKIP_CUDA_CONSTRAINTS_CHECK") != "1":
        raise RuntimeError("Unable to load CUDA. Is it installed?")
"""
ASK = {
    "a model": "LLM(TINY, tiny_llama(), max_context=64, drafter=None).generate([[1]])",
    "weights alone": "pack(TINY, iter(tiny_llama().items()), 'float32')",
}


@pytest.mark.parametrize("what", ASK)
def test_live_devices_with_a_plugin_and_no_gpu_prints_nothing(tmp_path, what):
    folder = tmp_path / "jax_plugins" / "xla_cuda_of_a_test"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(PLUGIN)
    script = f"""
from specmemo_jax import LLM
from specmemo_jax.llama.packing import pack
from specmemo_jax.testing import TINY, tiny_llama
{ASK[what]}
print("done")
"""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == "done\n", done.stderr
    assert done.stderr == ""
