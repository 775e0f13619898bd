"""The CUDA plugin where there is no GPU, kept off stderr. Imports no JAX, to stand around that import."""

import contextlib
import glob
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

_SKIP_CHECK = "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"
# What the plugin's libraries print while they load where there is no driver, before their logging can be set.
_CHATTER = ("All log messages before absl::InitializeLog()", "Could not find cuda drivers on your machine")


@contextlib.contextmanager
def quiet_plugins() -> Iterator[None]:
    """Around ``import jax`` and its first use: with the CUDA plugin and no GPU, nothing of that on stderr.

    The plugin is then meant for descriptions (`specmemo_jax.devices.described`). JAX would log a traceback of
    its search for a driver, and the plugin's libraries write to file descriptor 2 while they load. All else
    that is written there is passed on, at the end. Where a GPU is visible this does nothing.
    """
    if gpu_is_visible():
        yield
        return
    found = os.environ.get(_SKIP_CHECK)
    os.environ.setdefault(_SKIP_CHECK, "1")
    try:
        with _without_chatter():
            yield
    finally:
        if found is None:
            os.environ.pop(_SKIP_CHECK, None)


def live_devices() -> list[Any]:
    """`jax.devices()`, whose first call starts JAX's backends, plugins included."""
    import jax

    from specmemo_jax.devices.probe import backend_started

    if backend_started():
        return jax.devices()
    with quiet_plugins():
        return jax.devices()


def gpu_is_visible() -> bool:
    """Whether NVIDIA's driver shows a device here (as JAX decides it); starts nothing."""
    return bool(glob.glob("/dev/nvidia[0-9]*") or glob.glob("/dev/nvidiactl") or glob.glob("/dev/dxg"))


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    sys.stderr.flush()
    try:
        stderr = os.dup(2)
    except OSError:  # closed: there is nothing to keep clean
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            for line in held:
                if not any(chatter.encode() in line for chatter in _CHATTER):
                    os.write(2, line)
