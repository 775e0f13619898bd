"""A second start traces nothing; what cannot be used is made anew, and never crashes one."""

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import pytest

from specmemo_jax.draft import Drafter, NgramDrafter
from specmemo_jax.engine import executables, program_cache
from specmemo_jax.engine.engine import Engine
from specmemo_jax.engine.executables import ExecutableStore, fingerprint_of
from specmemo_jax.engine.program_cache import ProgramCache
from specmemo_jax.engine.programs import Programs
from specmemo_jax.engine.request import Request
from specmemo_jax.errors import CacheWarning
from specmemo_jax.llama.packing import pack
from specmemo_jax.memory.plan import lay_out
from specmemo_jax.memory.shapes import Shapes
from specmemo_jax.testing import TINY, tiny_llama

TARGET = pack(TINY, iter(tiny_llama().items()), jnp.dtype("float32"))
NGRAM = NgramDrafter(4)
COUNT = itertools.count(100)


def plan_for(drafter: Drafter | None = NGRAM, context=100, **choices):
    return lay_out(
        Shapes(TINY, dtype="float32", platform="cpu", batch=1, context=context, drafter=drafter, **choices)
    )


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder, and a JAX that has none of its own (what it served would not be kept again)."""
    monkeypatch.setattr(program_cache, "noting_cache_hits", lambda: contextlib.nullcontext([]))
    monkeypatch.setattr(Programs, "compile", compile_anew)
    return tmp_path / "executables"


def compile_anew(self, lowered):
    """As where JAX has no cache: another option is another key."""
    return lowered.compile({"xla_cpu_parallel_codegen_split_count": str(next(COUNT))})


@pytest.fixture
def lowered(monkeypatch):
    """Programs that were traced and lowered."""
    names, lower = [], ProgramCache.lowered

    def counted(self, *key):
        names.append(key)
        return lower(self, *key)

    monkeypatch.setattr(ProgramCache, "lowered", counted)
    return names


def run(cache, plan=None):
    """An answer of a new engine that shares nothing but the disk with the ones before."""
    plan, folder = plan or plan_for(), cache.parent
    store = ExecutableStore.in_folder(folder, TARGET, plan.shapes)
    programs = ProgramCache(Programs(TARGET, plan.shapes), store)
    programs.fetch_recent()
    engine = Engine(TARGET, plan, compiled=programs)
    request = Request([1, 2, 3] * 5, 30)
    engine.prepare([request])
    engine.admit(0, request)
    while not request.finished:
        engine.burst()
    engine.release(0)
    bytes_ = engine.live_generation_bytes
    engine.close()
    return request.new_ids, bytes_


def test_second_engine_lowers_nothing_says_the_same_and_knows_its_memory(cache, lowered):
    first = run(cache)
    made = len(lowered)
    assert made >= 3
    assert run(cache) == first
    assert len(lowered) == made
    assert {path.stat().st_mode & 0o77 for path in [cache, *cache.rglob("*.bin")]} == {0}


def test_donation_survives_the_disk(cache):
    run(cache)
    store = ExecutableStore.in_folder(cache.parent, TARGET, plan_for().shapes)
    assert store is not None
    programs = Programs(TARGET, plan_for().shapes)
    step = store.load("step-128-4-greedy-0")
    assert step is not None
    state = programs.empty_state(128)
    step(TARGET.leaves, (), state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.caches))


@pytest.mark.parametrize("damage", [b"", b"x" * 100, "half", "other"])
def test_broken_file_is_made_anew(cache, lowered, damage):
    first = run(cache)
    files = sorted(cache.rglob("*.bin"))
    for path, other in zip(files, [*files[1:], files[0]], strict=True):
        raw = path.read_bytes()
        if damage == "other":
            path.write_bytes(other.read_bytes())
            break  # one program in another's place
        path.write_bytes(raw[: len(raw) // 2] if damage == "half" else damage)
    made = len(lowered)
    if damage == "other":
        with contextlib.suppress(TypeError):  # refused when it is called, and no wrong answer
            assert run(cache) == first
        return
    assert run(cache) == first
    assert len(lowered) - made == made
    assert run(cache) == first
    assert len(lowered) - made == made


def test_folder_that_others_can_write_to_is_not_used(cache, lowered):
    run(cache)
    made = len(lowered)
    cache.chmod(0o777)
    with pytest.warns(CacheWarning, match="others can write to it"):
        run(cache)
    assert len(lowered) == 2 * made


def test_file_that_others_can_write_to_is_not_read(cache, lowered):
    run(cache)
    made = len(lowered)
    for path in cache.rglob("*.bin"):
        path.chmod(0o666)
    run(cache)
    assert len(lowered) == 2 * made


def test_fingerprint_of_other_plans_drafters_sources_and_flags_is_another(monkeypatch):
    found = [
        fingerprint_of(TARGET, plan_for().shapes),
        fingerprint_of(TARGET, plan_for(NgramDrafter(4, branches=2)).shapes),
        fingerprint_of(TARGET, plan_for(None).shapes),
        fingerprint_of(TARGET, plan_for(context=200).shapes),
        fingerprint_of(TARGET, plan_for(score_nodes=2).shapes),
    ]
    assert fingerprint_of(TARGET, plan_for(NgramDrafter(4)).shapes) == found[0]
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", "") + " --xla_cpu_enable_fast_math=false")
    found.append(fingerprint_of(TARGET, plan_for().shapes))
    monkeypatch.setattr(executables, "source_hash", lambda: "another source")
    found.append(fingerprint_of(TARGET, plan_for().shapes))
    assert len(set(found)) == len(found)


class Own(NgramDrafter):
    """A drafter whose source is not the package's."""


def test_store_of_a_drafter_of_one_s_own_is_none(cache):
    assert ExecutableStore.in_folder(cache.parent, TARGET, plan_for(Own(4)).shapes) is None
    assert ExecutableStore.in_folder(cache.parent, TARGET, plan_for().shapes) is not None


def test_store_drops_what_was_used_longest_ago(cache, monkeypatch):
    run(cache)
    files = sorted(cache.rglob("*.bin"))
    for age, path in enumerate(files):
        os.utime(path, (10**9 + age, 10**9 + age))
    monkeypatch.setattr(executables, "MOST_BYTES", sum(path.stat().st_size for path in files[2:]))
    store = ExecutableStore.in_folder(cache.parent, TARGET, plan_for().shapes)
    assert store is not None
    store._drop_oldest()
    assert sorted(cache.rglob("*.bin")) == files[2:]


SCRIPT = """
import jax.monitoring
hits = []
jax.monitoring.register_event_listener(lambda event, **_: "cache_hits" in event and hits.append(event))
from specmemo_jax import LLM, SamplingParams
from specmemo_jax.engine.program_cache import ProgramCache
from specmemo_jax.testing import TINY, tiny_llama
made, lower = [], ProgramCache.lowered
ProgramCache.lowered = lambda self, *key: made.append(key) or lower(self, *key)
with LLM(TINY, tiny_llama(), drafter="ngram", tree_nodes=4, max_context=64, compilation_cache=FOLDER) as llm:
    out = llm.generate([[1, 2, 3] * 4], SamplingParams(temperature=0, max_tokens=20))
print(len(made), len(hits), out[0].outputs[0].token_ids)
"""


def start(folder, **environment):
    """A process that answers with a folder of its own (None: JAX's)."""
    command = [sys.executable, "-c", SCRIPT.replace("FOLDER", repr(folder and str(folder)))]
    clean = {name: value for name, value in os.environ.items() if "COMPILATION_CACHE" not in name}
    return subprocess.Popen(
        command, env=clean | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def said(process):
    """Programs lowered, hits of JAX's cache, and the answer."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    made, hits, answer = out.split(" ", 2)
    return int(made), int(hits), answer


def test_start_over_a_cache_of_jax_s_leaves_no_broken_file(tmp_path):
    """What JAX's cache served cannot be serialised again on CPU: it loads, and fails when it is called."""
    mine = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    made, _, answer = said(start(None, **mine))
    assert made
    shutil.rmtree(tmp_path / "executables")  # as after an upgrade that compiles the same programs
    made, hits, same = said(start(None, **mine))
    assert made
    assert hits
    assert same == answer
    assert said(start(None, **mine))[2] == answer


def test_close_leaves_no_thread_behind_and_programs_can_still_be_asked_for(cache, lowered):
    run(cache)
    made = len(lowered)
    programs = ProgramCache(
        Programs(TARGET, plan_for().shapes),
        ExecutableStore.in_folder(cache.parent, TARGET, plan_for().shapes),
    )
    programs.fetch_recent()
    programs.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("executables")]
    assert programs.get("step", 128, 4) is not None
    assert len(lowered) == made


def test_two_processes_at_once_share_a_folder_and_a_third_lowers_nothing(tmp_path):
    both = [start(tmp_path) for _ in range(2)]
    answers = {said(process)[2] for process in both}
    made, _, answer = said(start(tmp_path))
    assert made == 0
    assert answers == {answer}
    assert (tmp_path / "executables").stat().st_mode & 0o777 == 0o700
