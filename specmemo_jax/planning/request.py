"""From what a user names to a plan: model, device, drafters allowed, and where the figures come from."""

import contextlib
import dataclasses
import itertools
import platform as host
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp

from specmemo_jax.checkpoints import open_checkpoint
from specmemo_jax.checkpoints.hub import is_hub_id
from specmemo_jax.checkpoints.zoo import resolve, zoo_entry
from specmemo_jax.devices.table import DeviceSpec, default_dtype_of, find_device
from specmemo_jax.draft import (
    Drafter,
    DraftModel,
    NgramDrafter,
    SelfDrafter,
    TreeShape,
    default_shape,
    is_model_name,
    make_drafter,
)
from specmemo_jax.draft.head_files import heads_for, names_head
from specmemo_jax.draft.load import open_head_drafter
from specmemo_jax.errors import ConfigError, ModelNotFoundError, WeightsError
from specmemo_jax.files.byte_size import parse_bytes
from specmemo_jax.llama.config import LlamaConfig
from specmemo_jax.llama.live_sets import backends
from specmemo_jax.llama.packing import Target
from specmemo_jax.memory.plan import MemoryPlan
from specmemo_jax.memory.workload import Workload
from specmemo_jax.mesh.axes import check_shards
from specmemo_jax.planning import cache_effect
from specmemo_jax.planning.calibration import Fingerprint, find_calibration, fingerprint
from specmemo_jax.planning.expected import expected_acceptance
from specmemo_jax.planning.profile import (
    AcceptanceProfile,
    ExpectedAcceptance,
    find_profile,
    profile_file,
    user_folder,
)
from specmemo_jax.planning.search import Candidate, PlanRequest, candidates, frontier, search
from specmemo_jax.planning.speed import Calibrated, SpeedModel, calibrated, roofline

DEFAULT_MODEL = "smollm2-135m-instruct"
DTYPES = ("float32", "bfloat16", "float16")
KV_DTYPES = ("auto", "int8")
NGRAM_NODES = (2, 4, 8, 16, 32, 64)
# Trees of a head that are offered: chains where nodes cost, wider ones where they are nearly free.
CPU_HEAD_TREES = tuple(TreeShape.of(nodes) for nodes in (3, 4, 5, 6))
GPU_HEAD_TREES = (TreeShape(4, 3), TreeShape(8, 4, 2), TreeShape(16, 5, 4))
# Where no acceptance was measured: the chance that a draft's next guess is right, about what Leviathan et al.
# (arXiv 2211.17192, table 2) measured with small drafts at temperature 0.
ASSUMED_CHANCE = 0.7


@dataclasses.dataclass(frozen=True)
class ModelRef:
    """A model that is planned for: its config, and the name that measurements are kept under."""

    name: str
    config: LlamaConfig


@dataclasses.dataclass(frozen=True)
class Planning:
    """Everything a plan is searched with."""

    request: PlanRequest
    offered: tuple[Candidate, ...]
    speed: SpeedModel
    budget: int | None = None

    def plan(self) -> MemoryPlan:
        """The best plan under the budget (`specmemo_jax.planning.search.search`)."""
        return search(self.request, self.offered, self.speed, self.budget)

    def frontier(self) -> list[MemoryPlan]:
        """The fastest plans for their memory, by rising peak; an open batch or context is that of `plan`."""
        workload, request = self.request.workload, self.request
        if workload.batch is None or workload.context is None:
            chosen = self.plan()
            workload = dataclasses.replace(workload, batch=chosen.batch, context=chosen.context)
            request = dataclasses.replace(request, workload=workload)
        return frontier(candidates(request, self.offered, self.speed))


def planning_for(
    model: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    drafter: str | Path | None = "auto",
    tree_nodes: int | None = None,
    memory_budget: int | str | None = None,
    batch: int | None = 1,
    context: int | None = None,
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    request_tokens: Sequence[int] = (),
    shards: int = 1,
    policy: str = "plan",
    kv_cache_dtype: str = "auto",
) -> Planning:
    """What `specmemo plan` searches: a model by name and a device by slug, neither of which need be here.

    ``request_tokens``: tokens, prompt and answer, of requests like those to come; rows then lie in groups.

    Raises ConfigError, ModelNotFoundError and CapacityError for what cannot be.
    """
    budget = None if memory_budget is None else parse_bytes(memory_budget)
    spec, named = find_device(device), named_config(model)
    chosen = dtype_for(spec, dtype)
    check_shards(named.config, shards)
    workload = workload_for(named.config, batch, context, prompt_tokens, new_tokens, request_tokens)
    kv_dtype = kv_dtype_for(kv_cache_dtype)
    cache = cache_source(named.name, kv_dtype)
    request = PlanRequest(named.config, chosen, spec, workload, shards, policy, kv_dtype, cache)
    draft = drafter_named(drafter, tree_nodes, named.config, request)
    offered = candidates_for(draft, named.name, request, tree_nodes)
    return Planning(request, offered, speed_for(request, named.name), budget)


def named_config(model: str | Path) -> ModelRef:
    """The config of a zoo name, a folder with ``config.json`` or a checkpoint; weights are not needed."""
    entry = zoo_entry(model) if isinstance(model, str) else None
    if entry is not None:
        return ModelRef(entry.name, entry.config)
    path = Path(model).expanduser()
    if path.is_dir() and (path / "config.json").is_file():
        with contextlib.suppress(WeightsError):  # weights that are there may say more (a head of their own)
            return ModelRef(str(model), open_checkpoint(path).config)
        return ModelRef(str(model), LlamaConfig.from_json(path / "config.json"))
    if path.is_file() and path.suffix == ".json":
        return ModelRef(str(model), LlamaConfig.from_json(path))
    if not path.exists() and isinstance(model, str) and is_hub_id(model):
        raise ModelNotFoundError(
            f"{model} would have to be fetched to be planned for; `specmemo pull {model}` (of a draft head, "
            "`specmemo convert`) and then the folder that it names, or a config.json, would work"
        )
    return ModelRef(str(model), open_checkpoint(resolve(model, download=False).path).config)


def workload_for(
    config: LlamaConfig,
    batch: int | None = 1,
    context: int | None = None,
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    lengths: Sequence[int] = (),
) -> Workload:
    """A workload; what is left open: 512 prompt tokens and 128 new ones, or what the context leaves."""
    most = min(context or config.max_context, config.max_context)
    lengths = tuple(sorted(min(length, most) for length in lengths))
    room = min(context or config.max_context, config.max_context)
    if new_tokens is None:
        new_tokens = max(1, min(128, room // 4 if prompt_tokens is None else room - prompt_tokens))
    if prompt_tokens is None:
        prompt_tokens = max(1, min(512, room - new_tokens))
    return Workload(batch, prompt_tokens, new_tokens, context, lengths)


def dtype_for(spec: DeviceSpec, dtype: str) -> str:
    """The dtype of weights and cache on a device. Raises ConfigError for one that it has no rate for."""
    if dtype == "auto":
        return default_dtype_of(spec)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
    if dtype not in spec.dtypes and spec.platform != "cpu":
        raise ConfigError(f"{spec.name} has no {dtype}; {', '.join(spec.dtypes)} would work")
    return dtype


def kv_dtype_for(kv_cache_dtype: str) -> str | None:
    """The cache's dtype, None for the weights' own. Raises ConfigError for one that is not known."""
    if kv_cache_dtype not in KV_DTYPES:
        raise ConfigError(f"kv_cache_dtype {kv_cache_dtype!r} is not one of {', '.join(KV_DTYPES)}")
    return None if kv_cache_dtype == "auto" else kv_cache_dtype


def cache_source(model: str, kv_dtype: str | None) -> str:
    """What is known of a lossy cache's effect on a model's tokens; empty for one that is not lossy."""
    if kv_dtype is None:
        return ""
    for name in dict.fromkeys((model, DEFAULT_MODEL)):
        files = [profile_file(folder, cache_effect.NAME) for folder in profile_folders(name)]
        for file in filter(Path.is_file, files):
            found = cache_effect.CacheEffect.load(file).source
            return f"{kv_dtype}, lossy: {found if name == model else f'borrowed: {found}'}"
    return f"{kv_dtype}, lossy; `specmemo calibrate --kv-cache-dtype {kv_dtype} --prompts` measures it"


def drafter_named(
    drafter: Drafter | str | Path | None, tree_nodes: int | None, config: LlamaConfig, request: PlanRequest
) -> Drafter | str | None:
    """For `candidates_for`: ``"auto"`` and ``"ngram"`` stay open, a model's name becomes its shapes."""
    if drafter in ("auto", "ngram"):
        return str(drafter)
    if is_model_name(drafter) and names_head(drafter):
        shape = default_shape(tree_nodes, request.platform)
        return open_head_drafter(drafter, config, shape, jnp.dtype(request.dtype), request.platform)
    if is_model_name(drafter):
        draft = named_config(drafter).config
        if draft.vocab_size != config.vocab_size:
            raise ConfigError(
                f"{drafter} cannot draft: its vocabulary has {draft.vocab_size} ids, the target's "
                f"{config.vocab_size}; a draft with the target's own vocabulary, ngram or self:K would work"
            )
        one_wide_layer = draft.num_layers == 1 and draft.hidden_size == config.hidden_size
        if one_wide_layer and not any(Path(drafter).glob("*.safetensors")):
            raise ConfigError(
                f"{drafter}: one layer as wide as the target's may be a draft head or a model, which its "
                "weights would tell; with them, or after `specmemo convert`, it would work"
            )
        return DraftModel(
            config=draft,
            load=_no_weights,
            shape=default_shape(tree_nodes, request.platform),
            dtype=request.dtype,
            vocab_size=config.vocab_size,
            name=f"draft model {drafter}",
            platform=request.platform,
        )
    assert not isinstance(drafter, Path)
    made = make_drafter(drafter, tree_nodes, platform=request.platform, dtype=request.dtype)
    if isinstance(made, SelfDrafter) and made.layers >= config.num_layers:
        raise ConfigError(f"{made.name}: the target has {config.num_layers} layers; fewer would work")
    return made


def candidates_for(
    drafter: Drafter | str | None, model: str, request: PlanRequest, tree_nodes: int | None = None
) -> tuple[Candidate, ...]:
    """Drafters to choose among: for ``"auto"`` n-gram trees and none, for a name or an object that one."""
    if drafter is None:
        return (Candidate(),)
    if isinstance(drafter, str):
        trees: list[Drafter] = [*_ngrams(request, tree_nodes)]
        if drafter == "auto":
            trees += _heads(model, request, tree_nodes)
        plain = (Candidate(),) if drafter == "auto" else ()
        return (*plain, *(Candidate(tree, find_expected_acceptance(tree, model)) for tree in trees))
    return (Candidate(drafter, find_expected_acceptance(drafter, model)),)


def _heads(model: str, request: PlanRequest, tree_nodes: int | None) -> list[Drafter]:
    """The zoo's heads for a model whose acceptance was measured, each with the trees that may pay. On a CPU,
    where a data sheet does not say what nodes cost, only once `specmemo calibrate` has measured it.
    """
    found: list[Drafter] = []
    if request.platform == "cpu" and not isinstance(speed_for(request, model), Calibrated):
        return found
    shapes = CPU_HEAD_TREES if request.platform == "cpu" else GPU_HEAD_TREES
    if tree_nodes is not None:
        shapes = (default_shape(tree_nodes, request.platform),)
    for name, shape in itertools.product(heads_for(model), shapes):
        # A head whose target has only the name in common, or that cannot fill the tree, is not offered.
        with contextlib.suppress(ConfigError, WeightsError):
            head = open_head_drafter(name, request.config, shape, jnp.dtype(request.dtype), request.platform)
            if stored_profile(model, head.name) is not None:
                found.append(head)
    return found


def _ngrams(request: PlanRequest, tree_nodes: int | None) -> list[NgramDrafter]:
    usual = make_drafter("ngram", tree_nodes, platform=request.platform, dtype=request.dtype)
    assert isinstance(usual, NgramDrafter)
    if tree_nodes is not None:
        return [usual]
    if usual.ladder:  # which fills no more nodes than a match is worth, where nodes cost
        return [usual, *(usual.limited(nodes) for nodes, _ in usual.ladder[:-1])]
    return [NgramDrafter(nodes) for nodes in NGRAM_NODES]


def find_expected_acceptance(drafter: Drafter, model: str) -> ExpectedAcceptance:
    """What a step of ``drafter`` is expected to bring on ``model``: as measured for it, else as measured for
    the default model, else assumed; its ``source`` says which.
    """
    profile = stored_profile(model, drafter.name)
    if profile is not None:
        return expected_acceptance(profile, drafter)
    if isinstance(drafter, NgramDrafter):  # what repeats depends on the text more than on the model
        borrowed = stored_profile(DEFAULT_MODEL, drafter.name)
        if borrowed is not None:
            found = expected_acceptance(borrowed, drafter)
            return dataclasses.replace(found, source=f"borrowed: {found.source}")
    chance = ASSUMED_CHANCE
    length = sum(chance**depth for depth in range(drafter.max_depth + 1))
    return ExpectedAcceptance(
        length,
        ((drafter.num_nodes, 1.0),),
        f"assumed: {chance:.0%} of a draft's guesses accepted; `specmemo calibrate --prompts` measures it",
    )


def stored_profile(model: str, drafter: str) -> AcceptanceProfile | None:
    """The profile of a drafter for a model by their names: the user's own, else the zoo's, else None."""
    return find_profile(drafter, *profile_folders(model))


def profile_folders(model: str) -> tuple[Path, ...]:
    """Where what was measured for a model lies: the user's own folder, then the zoo's."""
    entry = zoo_entry(model)
    return (user_folder(model), *(() if entry is None else (entry.folder / "profiles",)))


def speed_for(request: PlanRequest, model: str) -> SpeedModel:
    """What was measured for this device, model, dtype and versions; else the device's roofline.

    With an int8 cache nothing is measured, and the roofline counts its bytes; where the compiler converts a
    layer's cache before the product (all but CUDA from Ampere on), the converted copy counts, too.
    """
    spec, config = request.device, request.config
    if request.kv_dtype == "int8":
        fused = backends(request.platform, spec.compute_capability) == ("triton",)
        converted = 0 if fused else 2 * jnp.dtype(request.dtype).itemsize
        return roofline(spec, 1 + 4 / config.head_dim + converted)
    found = None
    if request.shards == 1:
        found = find_calibration(fingerprint_on(spec, model, config, request.dtype))
    return roofline(spec) if found is None else calibrated(found)


def fingerprint_on(spec: DeviceSpec, model: str, config: LlamaConfig, dtype: str) -> Fingerprint:
    """What measurements on a device are kept under; a processor by its model name."""
    kind = _processor() if spec.platform == "cpu" else spec.name
    return fingerprint(kind, model, config, jnp.dtype(dtype).name)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else host.processor() or host.machine()


def _no_weights() -> Target:
    raise ConfigError("a draft that is planned for has no weights; LLM(drafter=...) loads them")
