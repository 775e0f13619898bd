"""Strict JAX for every test: 8 virtual CPU devices, no silent promotion, shapes checked."""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# One program compiles once a session, whichever test asks first.
_CACHE = tempfile.TemporaryDirectory(prefix="specmemo-tests-")
jax.config.update("jax_compilation_cache_dir", _CACHE.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

from jaxtyping import install_import_hook

# The rooms that arrays pass through; the front doors check their own input, and are tested for it.
ROOMS = ["specmemo_jax.llama", "specmemo_jax.speculate", "specmemo_jax.draft", "specmemo_jax.memory.compiled"]
install_import_hook(ROOMS, "beartype.beartype")
