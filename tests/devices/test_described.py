import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from specmemo_jax.devices import described
from specmemo_jax.devices.compiled import compiled_memory
from specmemo_jax.devices.described import CUDA_FACTS, described_devices, gpu_target, missing_plugin
from specmemo_jax.devices.table import DEVICES, default_dtype_of
from specmemo_jax.errors import ConfigError
from specmemo_jax.llama import kv
from specmemo_jax.llama.model import forward, logits
from specmemo_jax.llama.packing import abstract_target
from specmemo_jax.testing import TINY

needs_plugin = pytest.mark.skipif(missing_plugin() is not None, reason=str(missing_plugin()))
B, T, S = 2, 4, 64


def placed(tree, sharding):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def everywhere(slug, count=1):
    return NamedSharding(Mesh(np.array(described_devices(slug, count)), ("x",)), PartitionSpec())


def test_every_cuda_device_of_the_table_can_be_described():
    cuda = {slug for slug, spec in DEVICES.items() if spec.platform == "cuda"}
    assert set(CUDA_FACTS) == cuda
    for slug in cuda:
        text = gpu_target(DEVICES[slug])
        assert f'device_description_str: "{DEVICES[slug].name}"' in text
        assert f"device_memory_size: {DEVICES[slug].memory_bytes}\n" in text
        assert text.count("{") == text.count("}")
    turing = gpu_target(DEVICES["titan-rtx"])
    assert "core_count: 72" in turing
    assert "major: 7 minor: 5" in turing


@pytest.mark.parametrize("slug", ["mi250-gcd", "cpu"])
def test_what_cannot_be_described(slug):
    with pytest.raises(ConfigError, match=r"titan-rtx, t4.* would work") as error:
        described_devices(slug)
    assert ("ROCm's own libraries" in str(error.value)) == (slug == "mi250-gcd")


def test_bad_requests():
    with pytest.raises(ConfigError, match="no device 'gtx-480'"):
        described_devices("gtx-480")
    with pytest.raises(ConfigError, match="titan-rtx"):
        described_devices("auto")
    with pytest.raises(ConfigError, match="at least 1, found 0"):
        described_devices("t4", 0)


@pytest.mark.parametrize(
    ("installed", "listed"),
    [
        ({}, "neither"),
        ({"jax-cuda12-pjrt": jax.__version__}, "jax-cuda12-pjrt "),
        ({"jax-cuda12-pjrt": "0.4.1", "jax-cuda12-plugin": "0.4.1"}, "jax-cuda12-pjrt 0.4.1, jax-"),
    ],
)  # fmt: skip
def test_a_missing_or_other_plugin_is_said_with_the_command(monkeypatch, installed, listed):
    def version(package):
        if package not in installed:
            raise described.importlib.metadata.PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(described.importlib.metadata, "version", version)
    with pytest.raises(
        ConfigError, match=f"found {listed}.*pip install --no-deps jax-cuda12-pjrt=={jax.__version__}"
    ):
        described_devices("a100-40", 3)
    assert "pip install" in (missing_plugin() or "")


@needs_plugin
@pytest.mark.parametrize("slug", sorted(CUDA_FACTS))
def test_a_product_compiles_for_each(slug):
    devices = described_devices(slug)
    assert devices == described_devices(slug)
    assert devices[0].device_kind == DEVICES[slug].name
    assert devices[0].compute_capability == DEVICES[slug].compute_capability
    dtype = jnp.dtype(default_dtype_of(DEVICES[slug]))
    x = jax.ShapeDtypeStruct((64, 64), dtype, sharding=everywhere(slug))
    figures = compiled_memory(jax.jit(lambda a, b: a @ b).lower(x, x).compile())
    assert (figures.arguments, figures.outputs) == (2 * 64 * 64 * 2, 64 * 64 * 2)


def step(target):
    def run(leaves, cache, tokens, positions, ancestors, lengths):
        model = target.merge(leaves)
        hidden, new = forward(model, (cache,), tokens, positions, ancestors, lengths)
        chosen = logits(model, hidden).argmax(-1)
        starts = lengths + (chosen[:, 0] == tokens[:, 1]).astype(
            jnp.int32
        )  # the write waits for what was read
        return kv.write(cache, new, starts, jnp.arange(B), "gpu"), chosen

    return run


@needs_plugin
@pytest.mark.parametrize("slug", ["titan-rtx", "h100"])  # 3 s each; the others are alike
def test_a_llama_step_compiles_with_its_cache_in_place(slug):
    dtype = jnp.dtype(default_dtype_of(DEVICES[slug]))
    target = abstract_target(TINY, dtype, "gpu")
    shape = (B, TINY.num_kv_heads, S, TINY.head_dim)
    cache = jax.eval_shape(lambda: kv.init_cache(TINY.num_layers, shape, dtype))
    integers = jax.ShapeDtypeStruct((B, T), jnp.int32)
    inputs = (
        target.leaves, cache, integers, integers,
        jax.ShapeDtypeStruct((B, T, T), jnp.bool_), jax.ShapeDtypeStruct((B,), jnp.int32),
    )  # fmt: skip
    lowered = jax.jit(step(target), donate_argnums=1).lower(*placed(inputs, everywhere(slug)))
    figures = compiled_memory(lowered.compile())
    cache_bytes = 2 * TINY.num_layers * int(np.prod(shape)) * dtype.itemsize
    assert figures.aliased >= cache_bytes
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in target.leaves)
    assert figures.arguments >= cache_bytes + weights
    assert figures.temporaries > 0


@needs_plugin
def test_eight_devices_share_one_array():
    devices = described_devices("a100-40", 8)
    rows = NamedSharding(Mesh(np.array(devices), ("x",)), PartitionSpec("x"))
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=rows)
    figures = compiled_memory(jax.jit(lambda a: 2 * a).lower(x).compile())
    assert figures.arguments == 64 * 32 * 4 // 8


@needs_plugin
@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="a GPU is here")
@pytest.mark.parametrize("first", ["pass", "jax.devices()"])
def test_jax_by_itself_is_neither_broken_nor_loud(first):
    """In a process that asks for no platform, with JAX started before or by the description."""
    code = f"""
import os, sys
from specmemo_jax.devices.quiet import quiet_plugins
with quiet_plugins():
    import jax
    {first}
from specmemo_jax.devices.described import described_devices
print("kept", file=sys.stderr)
assert described_devices("t4", 2)[1].platform == "gpu"
assert jax.devices()[0].platform == "cpu"
assert "JAX_SKIP_CUDA_CONSTRAINTS_CHECK" not in os.environ
"""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "kept\n")
