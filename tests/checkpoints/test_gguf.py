import dataclasses
import tracemalloc

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_checkpoints import permute, random_tensors, raw_config, write_gguf

from specmemo_jax.checkpoints import open_checkpoint
from specmemo_jax.checkpoints.gguf_header import read_gguf_header
from specmemo_jax.checkpoints.gguf_llama import llama3_divisors, undo_permutation
from specmemo_jax.errors import ConfigError, SpecMemoError, WeightsError
from specmemo_jax.llama.config import LlamaConfig, RopeScaling

WIDE = raw_config(hidden_size=256, intermediate_size=256, num_hidden_layers=1, vocab_size=32)
GATE = "layers.0.mlp.gate_proj.weight"


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 3))
def test_undo_permutation_inverts_the_converters(heads, half, inputs):
    shape = (heads * half * 2, inputs) if inputs else (heads * half * 2,)
    rows = np.arange(np.prod(shape)).reshape(shape)
    np.testing.assert_array_equal(undo_permutation(permute(rows, heads), heads), rows)


def test_f32_round_trip(tmp_path, config):
    tensors = random_tensors(config)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors, config))
    read = dict(checkpoint.tensors())
    assert checkpoint.config == config
    assert checkpoint.config.rms_norm_eps == 1e-5  # not float32's 9.99e-06
    assert read.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(read[name], array)
    assert open_checkpoint(tmp_path).config == config  # a folder with one GGUF


def test_biases_tied_and_wide_heads(tmp_path):
    raw = raw_config(attention_bias=True, mlp_bias=True, head_dim=16, tie_word_embeddings=True)
    config = LlamaConfig.from_dict(raw)
    tensors = random_tensors(config)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors, config))
    assert checkpoint.config == config
    for name, array in checkpoint.tensors():
        np.testing.assert_array_equal(array, tensors[name])


@pytest.mark.parametrize("kind", [Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1])
def test_types_that_gguf_can_write(tmp_path, kind):
    config = LlamaConfig.from_dict(WIDE)
    tensors = random_tensors(config)
    path = write_gguf(tmp_path / "m.gguf", tensors, config, lambda name: kind if name == GATE else Type.F32)
    read = dict(open_checkpoint(path).tensors())[GATE]
    packed = gguf.quants.quantize(tensors[GATE], kind)
    plain = {Type.F16: np.dtype(np.float16), Type.BF16: np.dtype(ml_dtypes.bfloat16)}
    assert read.dtype == plain.get(kind, np.dtype(np.float32))
    np.testing.assert_array_equal(read.astype(np.float32), gguf.dequantize(packed, kind))
    blocks = packed.view(np.uint8).reshape(-1)
    if kind in SCALAR:
        np.testing.assert_allclose(read.reshape(-1), SCALAR[kind](blocks), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [Type.Q4_K, Type.Q6_K])
def test_k_quants_against_a_scalar_reading(tmp_path, kind):
    config = LlamaConfig.from_dict(WIDE)
    block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (256, block_bytes), dtype=np.uint8)
    scale = slice(0, 4) if kind is Type.Q4_K else slice(208, 210)
    halves = rng.uniform(-1, 1, (256, (scale.stop - scale.start) // 2)).astype(np.float16)
    blocks[:, scale] = halves.view(np.uint8)
    path = write_gguf(
        tmp_path / "m.gguf",
        random_tensors(config),
        config,
        lambda name: kind if name == GATE else Type.F32,
        packed={GATE: blocks},
    )
    checkpoint = open_checkpoint(path)
    read = dict(checkpoint.tensors())[GATE]
    np.testing.assert_allclose(read.reshape(-1), SCALAR[kind](blocks.reshape(-1)), rtol=1e-5, atol=1e-6)
    assert kind.name in {entry.stored_as for entry in checkpoint.entries}


def test_q_and_k_are_unpermuted_after_dequantising(tmp_path):
    config = LlamaConfig.from_dict(WIDE)
    name, heads = "layers.0.self_attn.k_proj.weight", 2
    tensors = random_tensors(config)
    path = write_gguf(tmp_path / "m.gguf", tensors, config, lambda n: Type.Q8_0 if n == name else Type.F32)
    read = dict(open_checkpoint(path).tensors())[name]
    stored = gguf.dequantize(gguf.quants.quantize(permute(tensors[name], heads), Type.Q8_0), Type.Q8_0)
    np.testing.assert_array_equal(permute(read, heads), stored)
    assert np.abs(read - tensors[name]).max() < 0.05


def test_unsupported_type_is_named(tmp_path):
    config = LlamaConfig.from_dict(WIDE)
    path = write_gguf(
        tmp_path / "m.gguf", random_tensors(config), config, lambda n: Type.Q5_0 if n == GATE else Type.F32
    )
    with pytest.raises(WeightsError, match=r"ffn_gate.weight' is Q5_0, which is not supported \(F32, F16"):
        open_checkpoint(path)


def test_nan_scale_is_refused(tmp_path):
    config = LlamaConfig.from_dict(WIDE)
    blocks = np.zeros((256, 34 * 8), np.uint8)
    blocks[7, 0:2] = np.array([np.nan], np.float16).view(np.uint8)
    path = write_gguf(
        tmp_path / "m.gguf",
        random_tensors(config),
        config,
        lambda n: Type.Q8_0 if n == GATE else Type.F32,
        packed={GATE: blocks},
    )
    with pytest.raises(WeightsError, match=r"blk.0.ffn_gate.weight' holds NaN"):
        list(open_checkpoint(path).tensors())


@pytest.mark.parametrize(
    ("scaling", "extra"),
    [
        (RopeScaling(), lambda w: None),
        (RopeScaling(), lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.NONE)),
        (
            RopeScaling("linear", 4.0),
            lambda w: (w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR), w.add_rope_scaling_factor(4.0)),
        ),
        (
            RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
            lambda w: w.add_tensor(
                "rope_freqs.weight",
                llama3_divisors(RopeScaling("llama3", 8.0, 1.0, 4.0, 8192), 5e5, 64).astype(np.float32),
            ),
        ),
        (RopeScaling(), lambda w: w.add_tensor("rope_freqs.weight", np.ones(32, np.float32))),
    ],
)
def test_rope_scaling(tmp_path, scaling, extra):
    config = LlamaConfig.from_dict(raw_config(rope_theta=5e5, head_dim=64))
    path = write_gguf(tmp_path / "m.gguf", random_tensors(config), config, extra=extra)
    assert open_checkpoint(path).config == dataclasses.replace(config, rope_scaling=scaling)


def test_llama3_divisors_keep_fast_and_divide_slow_frequencies():
    divisors = llama3_divisors(RopeScaling("llama3", 8.0, 1.0, 4.0, 8192), 5e5, 128)
    assert divisors[0] == 1.0
    assert divisors[-1] == pytest.approx(8.0)
    assert (np.diff(divisors) >= -1e-12).all()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), "rope scaling 'yarn'"),
        (
            lambda w: w.add_tensor("rope_freqs.weight", np.full(4, 3, np.float32)),
            "rope_freqs.weight does not",
        ),
        (lambda w: w.add_expert_count(8), "expert_count=8"),
        (lambda w: w.add_value_length(4), "value_length=4"),
        (lambda w: w.add_uint16("split.count", 2), "one of 2 split files"),
        (lambda w: w.add_string("general.architecture", "qwen2"), "architecture 'qwen2'"),
    ],
)
def test_unsupported_features_are_named(tmp_path, config, extra, message):
    def quietly(writer):
        writer.kv_data[0].pop("general.architecture", None)
        writer.add_string("general.architecture", "llama") if "qwen" not in message else None
        extra(writer)

    path = write_gguf(tmp_path / "m.gguf", random_tensors(config), config, extra=quietly)
    with pytest.raises(ConfigError, match=message):
        open_checkpoint(path)


def test_unknown_and_missing_tensors(tmp_path, config):
    tensors = random_tensors(config)
    extra = write_gguf(
        tmp_path / "a.gguf",
        tensors,
        config,
        extra=lambda w: w.add_tensor("blk.0.what.weight", np.ones(32, "f4")),
    )
    with pytest.raises(WeightsError, match=r"blk.0.what.weight.* not expected"):
        open_checkpoint(extra)
    del tensors[GATE]
    with pytest.raises(WeightsError, match=f"{GATE}.* missing"):
        open_checkpoint(write_gguf(tmp_path / "b.gguf", tensors, config))
    with pytest.raises(WeightsError, match="holds 2 GGUF files"):
        open_checkpoint(tmp_path)


def test_truncated_files(tmp_path, config):
    path = write_gguf(tmp_path / "m.gguf", random_tensors(config), config)
    content = path.read_bytes()
    for keep in (0, 3, 20, 60, 400, len(content) // 2, len(content) - 64):
        path.write_bytes(content[:keep])
        with pytest.raises(WeightsError, match=r"m\.gguf: "):
            open_checkpoint(path)
    path.write_bytes(b"PK\3\4" + content[4:])
    with pytest.raises(WeightsError, match="not a GGUF file"):
        open_checkpoint(path)


@pytest.mark.parametrize("at", [8, 16, 24])  # tensor count, metadata count, first key's length
def test_huge_declared_counts_are_refused_at_once(tmp_path, config, at):
    path = write_gguf(tmp_path / "m.gguf", random_tensors(config), config)
    content = bytearray(path.read_bytes())
    content[at : at + 8] = (2**63 - 1).to_bytes(8, "little")
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="truncated"):
        read_gguf_header(path)


def test_overlapping_tensors_are_refused(tmp_path, config):
    path = write_gguf(tmp_path / "m.gguf", random_tensors(config), config)
    content = path.read_bytes()
    name = b"token_embd.weight"
    # After the name: dimension count (4), two dimensions (16), type (4), offset (8).
    at = content.index(b"blk.0.attn_norm.weight") + len(b"blk.0.attn_norm.weight") + 4 + 8 + 4
    changed = content[:at] + (0).to_bytes(8, "little") + content[at + 8 :]
    assert name in changed
    path.write_bytes(changed)
    with pytest.raises(WeightsError, match="overlap"):
        read_gguf_header(path)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_corrupt_headers_never_crash(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "corrupt-gguf"
    path, whole = folder / "m.gguf", folder / "whole"
    if not folder.exists():
        folder.mkdir()
        config = LlamaConfig.from_dict(raw_config())
        write_gguf(whole, random_tensors(config), config, extra=lambda w: w.add_token_list(["a", "b", "c"]))
    content = bytearray(whole.read_bytes())
    for at, byte in data.draw(st.lists(st.tuples(st.integers(0, 2500), st.integers(0, 255)), min_size=1)):
        content[at] = byte
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), 100, 1000, len(content) - 1]))])
    try:
        for _ in open_checkpoint(path).tensors():
            pass
    except SpecMemoError as error:
        assert "\n" not in str(error)  # noqa: PT017


def test_quantised_tensors_are_unpacked_piece_by_piece(tmp_path):
    raw = raw_config(hidden_size=512, intermediate_size=2048, vocab_size=4096, num_hidden_layers=1)
    config = LlamaConfig.from_dict(raw)
    tensors = {name: np.zeros(shape, np.float32) for name, shape in config.tensor_shapes().items()}
    path = write_gguf(
        tmp_path / "m.gguf", tensors, config, lambda n: Type.Q8_0 if n == "embed_tokens.weight" else Type.F32
    )
    checkpoint = open_checkpoint(path)
    entry = next(entry for entry in checkpoint.entries if entry.name == "embed_tokens.weight")
    tracemalloc.start()
    array = entry.read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert array.nbytes == 8 << 20
    assert peak < array.nbytes + (16 << 20)


def _nibbles(byte):
    return byte & 15, byte >> 4


def _half(two_bytes):
    return float(np.frombuffer(bytes(two_bytes), "<f2")[0])


def _scalar_q8_0(data):
    out = []
    for block in data.reshape(-1, 34):
        out += [_half(block[:2]) * int(q) for q in block[2:].view(np.int8)]
    return np.array(out, np.float32)


def _scalar_q4(data, with_min):
    out = []
    for block in data.reshape(-1, 20 if with_min else 18).tolist():
        scale, least = _half(block[:2]), _half(block[2:4]) if with_min else None
        pairs = [_nibbles(byte) for byte in block[4 if with_min else 2 :]]
        for q in [low for low, _ in pairs] + [high for _, high in pairs]:
            out.append(scale * (q - 8) if least is None else scale * q + least)
    return np.array(out, np.float32)


def _scalar_q4_k(data):
    out = []
    for block in data.reshape(-1, 144).tolist():
        scale, least, packed, quants = _half(block[:2]), _half(block[2:4]), block[4:16], block[16:]
        for part in range(8):
            if part < 4:
                s, m = packed[part] & 63, packed[part + 4] & 63
            else:
                s = (packed[part + 4] & 15) | (packed[part - 4] >> 6 << 4)
                m = (packed[part + 4] >> 4) | (packed[part] >> 6 << 4)
            for byte in quants[part // 2 * 32 : part // 2 * 32 + 32]:
                out.append(scale * s * _nibbles(byte)[part % 2] - least * m)
    return np.array(out, np.float32)


def _scalar_q6_k(data):
    out = []
    for block in data.reshape(-1, 210):
        low, high, scales = (
            block[:128].tolist(),
            block[128:192].tolist(),
            block[192:208].view(np.int8).tolist(),
        )
        scale = _half(block[208:210])
        for i in range(256):
            half, quarter, j = i // 128, i % 128 // 32, i % 32
            four = _nibbles(low[half * 64 + quarter % 2 * 32 + j])[quarter // 2]
            two = high[half * 32 + j] >> (2 * quarter) & 3
            out.append(scale * scales[i // 16] * ((four | two << 4) - 32))
    return np.array(out, np.float32)


SCALAR = {
    Type.Q8_0: _scalar_q8_0,
    Type.Q4_0: lambda data: _scalar_q4(data, with_min=False),
    Type.Q4_1: lambda data: _scalar_q4(data, with_min=True),
    Type.Q4_K: _scalar_q4_k,
    Type.Q6_K: _scalar_q6_k,
}
