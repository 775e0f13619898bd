"""Strict JAX for every test: 8 virtual CPU devices, no silent promotion, shapes checked."""

import gc
import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# One program compiles once a session, whichever test asks first: xdist's workers and commands that tests
# start inherit the folder. A bounded cache locks its files, so that nobody reads half a program.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="specmemo-tests-")
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": _CACHE.name,
        "JAX_COMPILATION_CACHE_MAX_SIZE": str(2**32),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
# `python3 scripts/test.py --thorough`: programs as a user runs them, all reference rows, and nothing skipped.
from thorough import THOROUGH

# The suite's time is compiling: LLVM optimises nothing, here and in the processes that tests start. XLA has
# fused operations and assigned buffers before; see `optimized_programs`.
_OWN_LEVEL = "optimization_level" in os.environ.get("XLA_FLAGS", "")
if os.environ["JAX_PLATFORMS"] == "cpu" and not _OWN_LEVEL and not THOROUGH:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

from jaxtyping import install_import_hook
from rooms import CHECKED

install_import_hook([f"specmemo_jax.{room}" for room in CHECKED], "beartype.beartype")

from specmemo_jax.devices.compiler import compiler_options


def pytest_terminal_summary(terminalreporter):
    """Say what was skipped, and how to run it."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = sorted({str(report.longrepr[2]).removeprefix("Skipped: ") for report in skipped})
    if skipped:
        how = "none may be in a thorough run" if THOROUGH else "python3 scripts/test.py --thorough runs them"
        terminalreporter.write_line(f"{len(skipped)} tests skipped ({'; '.join(reasons)}): {how}")


def pytest_sessionfinish(session):
    """A thorough run skips nothing that it could have run."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if THOROUGH and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="module", autouse=True)
def room_for_programs(request):
    """Free what a module compiled, where that is much: a process may have 65,530 memory maps (Linux's
    default), a program takes some dozens of them, and XLA crashes where it gets none.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 5_000:
        for value in vars(request.module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def optimized_programs():
    """For modules that want the engine's programs as a user runs them."""
    options = {**(compiler_options("cpu") or {}), "xla_backend_optimization_level": 3}
    name = "specmemo_jax.engine.programs.compiler_options"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(name, lambda platform, tuned=True: options)
        yield


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}
TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(folder: Path) -> None:
    """Bytes as tokens, and ChatML's specials."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(specials + letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in specials])
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(str(folder))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A tiny chat model in Hugging Face's layout."""
    from safetensors.numpy import save_file

    from specmemo_jax.llama.config import LlamaConfig
    from specmemo_jax.testing import tiny_llama

    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tensors = tiny_llama(LlamaConfig.from_dict(CONFIG))
    save_file({f"model.{name}": tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    make_tokenizer(folder)
    return folder
