import io
import pickle
import zipfile

import numpy as np
import pytest
from torch_zip import BF16, Program, save_torch, write_zip

from specmemo_jax.checkpoints.pickled_tensors import list_pickled
from specmemo_jax.errors import WeightsError

ONE = np.arange(6, dtype=np.float32)


def dict_of(program: Program, name: str = "w") -> bytes:
    """A dict of one entry, which the program's bytes leave on the stack."""
    body = program.out.getvalue()[2:]
    return Program().raw(b"}").text(name).raw(body + b"s").end()


def one(tmp_path, program: bytes, data: bytes = ONE.tobytes(), **options):
    return list_pickled(write_zip(tmp_path / "x.bin", program, {"0": data}, **options))


@pytest.mark.parametrize("parameters", [False, True])
def test_tensors_of_every_type_come_back_as_they_were(tmp_path, parameters):
    rng = np.random.default_rng(0)
    tensors = {
        "a": rng.standard_normal((3, 4)).astype(np.float32),
        "b": rng.standard_normal((5,)).astype(np.float16),
        "c": rng.standard_normal((2, 2, 2)).astype(BF16),
        "d": rng.integers(-9, 9, 7),
        "e": np.array([True, False, True]),
        "f": rng.standard_normal((2, 3)),
        "scalar": np.float32(3.5).reshape(()),
        "empty": np.zeros((0,), np.float32),
    }
    found = list_pickled(save_torch(tmp_path / "pytorch_model.bin", tensors, parameters))
    assert [tensor.name for tensor in found] == list(tensors)
    assert [tensor.dtype for tensor in found[:6]] == ["F32", "F16", "BF16", "I64", "BOOL", "F64"]
    for tensor in found:
        values, wanted = tensor.read(), tensors[tensor.name]
        assert tensor.shape == wanted.shape == values.shape
        assert values.dtype == (np.float32 if wanted.dtype == np.float64 else wanted.dtype)
        np.testing.assert_array_equal(values, wanted.astype(values.dtype))


def test_views_of_one_storage(tmp_path):
    body = Program().raw(b"}").text("turned").tensor("FloatStorage", "0", 6, 0, (3, 2), (1, 3)).raw(b"s")
    body.text("tail").tensor("FloatStorage", "0", 6, 4, (2,), (1,)).raw(b"s")
    found = {tensor.name: tensor.read() for tensor in one(tmp_path, body.end())}
    np.testing.assert_array_equal(found["turned"], ONE.reshape(2, 3).T)
    np.testing.assert_array_equal(found["tail"], [4, 5])


def test_names_of_the_fourth_protocol(tmp_path):
    program = b"\x80\x04\x8c\x0bcollections\x8c\x0bOrderedDict\x93)R."
    assert one(tmp_path, program) == []


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("torch", "load"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("numpy", "frombuffer"),
        ("collections", "defaultdict"),
    ],
)
def test_any_other_name_is_refused_by_name_and_nothing_runs(tmp_path, module, name):
    ran = tmp_path / "ran"
    call = Program().name(module, name).raw(b"(").text(f"touch {ran}").raw(b"tR")
    with pytest.raises(WeightsError, match=r"x\.bin asks for .* would run code; the tensors alone") as caught:
        one(tmp_path, dict_of(call))
    assert f"{module}.{name}" in str(caught.value)
    assert not ran.exists()


def test_a_real_pickle_that_would_run_is_refused(tmp_path):
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (open, (str(ran), "w"))

    for protocol in range(2, 6):
        with pytest.raises(WeightsError):
            one(tmp_path, pickle.dumps({"w": {"deep": [Evil()]}}, protocol))
        with pytest.raises(WeightsError, match=r"asks for (io|_io)\.open"):
            one(tmp_path, pickle.dumps({"w": Evil()}, protocol))
    assert not ran.exists()


@pytest.mark.parametrize(
    ("offset", "shape", "strides", "match"),
    [
        (0, (7,), (1,), "beyond its storage"),
        (1, (6,), (1,), "beyond its storage"),
        (0, (2, 3), (4, 1), "beyond its storage"),
        (0, (2**40, 2**40), (0, 0), "beyond its storage"),
        (0, (1, 1000), (1, 0), "beyond its storage"),
        (0, (0, 2**60), (1, 1), "beyond its storage"),
        (7, (0,), (1,), "beyond its storage"),
        (0, (2,), (-1,), "what is not sizes"),
        (-1, (2,), (1,), "what is not sizes"),
        (0, (-2, -3), (1, 1), "what is not sizes"),
        (0, (2**70,), (1,), "what is not sizes"),
        (0, (6,), (1, 1), "what is not sizes"),
        (0, (1,) * 9, (1,) * 9, "what is not sizes"),
    ],
)
def test_views_beyond_their_storage_are_refused(tmp_path, offset, shape, strides, match):
    with pytest.raises(WeightsError, match=match):
        one(tmp_path, dict_of(Program().tensor("FloatStorage", "0", 6, offset, shape, strides)))


@pytest.mark.parametrize(
    ("kind", "key", "size", "match"),
    [
        ("FloatStorage", "1", 6, "storage '1' of size 6, not there"),
        ("FloatStorage", "../data.pkl", 6, "not there"),
        ("FloatStorage", "0", 5, "has 24 bytes, its size says 20"),
        ("FloatStorage", "0", 2**40, "its size says 4,398"),
        ("DoubleStorage", "0", 6, "its size says 48"),
        ("FloatStorage", "0", -1, "not there"),
        ("ComplexFloatStorage", "0", 3, "asks for torch.ComplexFloatStorage"),
        ("UntypedStorage", "0", 24, "asks for torch.UntypedStorage"),
    ],
)
def test_wrong_storages_are_refused(tmp_path, kind, key, size, match):
    with pytest.raises(WeightsError, match=match):
        one(tmp_path, dict_of(Program().tensor(kind, key, size, 0, (1,), (1,))))


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (b"(" * 20, "nested deeper"),
        (b")" + b"\x85" * 6, "tuple of 1 items, 5 deep"),
        (b"(" + b"K\x01" * 65 + b"t", "tuple of 65 items"),
        (b"]", "opcode EMPTY_LIST"),
        (b"(K\x01o", "opcode OBJ"),
        (b")\x81", "opcode NEWOBJ"),
        (b"\x82\x01", "opcode EXT1"),
        (b"B\xff\xff\xff\x7fabc", "cannot be read"),
        (b"X\xff\xff\xff\x7fabc", "cannot be read"),
        (b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f", "cannot be read"),
        (b"r\xff\xff\xff\x7f", "empty stack"),
        (b"h\x05", "cannot be read"),
        (b"R", "empty stack"),
        (b"t", "looks for a mark"),
        (b"K\x01K\x02R", "calls what is not a name"),
        (b"K\x01Q", "names no storage"),
        (b"K\x01K\x02K\x03s", "not a dict"),
        (b"}K\x02K\x03s", "key of type int"),
        (b"ctorch\nSize\n}b", "changes what is not a dict"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n)R", "calls _rebuild_tensor_v2"),
        (b"ctorch\nFloatStorage\n)R", "calls FloatStorage"),
        (b"0", "opcode POP"),
    ],
)
def test_strange_programs_are_refused(tmp_path, body, match):
    with pytest.raises(WeightsError, match=match) as caught:
        one(tmp_path, b"\x80\x02" + body + b".")
    assert "\n" not in str(caught.value)


def test_what_is_no_dict_of_tensors(tmp_path):
    with pytest.raises(WeightsError, match="no dict of tensors"):
        one(tmp_path, Program().number(3).end())
    with pytest.raises(WeightsError, match="'epoch' is not a tensor"):
        one(tmp_path, dict_of(Program().number(3), "epoch"))
    with pytest.raises(WeightsError, match="before seeing STOP"):
        one(tmp_path, b"")


def test_a_program_is_read_up_to_its_size_only(tmp_path):
    with pytest.raises(WeightsError, match=r"data\.pkl has .* bytes, 4,194,304 at most"):
        one(tmp_path, b"\x80\x02" + b"N" * 2**22 + b".")


def test_other_formats_are_refused_with_what_would_work(tmp_path):
    for data in (
        pickle.dumps({"w": 1}),
        b"",
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",
        b"PK\x03\x04 no more",
    ):
        (tmp_path / "old.pt").write_bytes(data)
        with pytest.raises(WeightsError, match=r"not torch's zip format .* saved again by torch\.save"):
            list_pickled(tmp_path / "old.pt")
    with pytest.raises(WeightsError, match="not torch's zip format"):
        list_pickled(tmp_path / "absent.pt")


def test_strange_archives_are_refused(tmp_path):
    good = dict_of(Program().tensor("FloatStorage", "0", 6, 0, (6,), (1,)))
    with pytest.raises(WeightsError, match="compressed or encrypted"):
        one(tmp_path, good, compression=zipfile.ZIP_DEFLATED)
    path = tmp_path / "none.bin"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/other", b"")
    with pytest.raises(WeightsError, match=r"holds 0 data\.pkl"):
        list_pickled(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", good)
        file.writestr("a/byteorder", "big")
    with pytest.raises(WeightsError, match="big-endian"):
        list_pickled(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", good)
        file.writestr("a/data/0", ONE.tobytes())
        with pytest.warns(UserWarning, match="Duplicate"):
            file.writestr("a/data/0", ONE.tobytes())
    with pytest.raises(WeightsError, match="a member twice"):
        list_pickled(path)


def test_members_that_overlap_are_more_than_the_file(tmp_path):
    data = np.zeros(4096, np.float32)
    path = write_zip(tmp_path / "x.bin", b"\x80\x02}.", {"0": data.tobytes()})
    buffer = bytearray(path.read_bytes())
    at = buffer.rfind(b"archive/data/0") - 46
    buffer[at + 20 : at + 28] = (2**31).to_bytes(4, "little") * 2
    path.write_bytes(buffer)
    with pytest.raises(WeightsError, match="says that it holds more than its"):
        list_pickled(path)


def test_flipped_bytes_are_found_when_read(tmp_path):
    path = save_torch(tmp_path / "x.bin", {"w": ONE})
    data = path.read_bytes()
    path.write_bytes(data.replace(ONE.tobytes(), ONE[::-1].tobytes()))
    (tensor,) = list_pickled(path)
    with pytest.raises(WeightsError, match="is damaged"):
        tensor.read()


def test_every_cut_of_a_file_is_an_error_of_ours(tmp_path):
    data = save_torch(tmp_path / "x.bin", {"w": ONE}).read_bytes()
    for length in range(0, len(data), 7):
        (tmp_path / "cut.bin").write_bytes(data[:length])
        with pytest.raises(WeightsError):
            list_pickled(tmp_path / "cut.bin")


def test_no_change_of_a_program_gives_another_error(tmp_path):
    rng = np.random.default_rng(1)
    good = bytearray(dict_of(Program().tensor("FloatStorage", "0", 6, 0, (2, 3), (3, 1))))
    for _ in range(400):
        bad = bytearray(good)
        for at in rng.integers(2, len(bad), 3):
            bad[at] = rng.integers(256)
        try:
            for tensor in one(tmp_path, bytes(bad)):
                tensor.read()
        except WeightsError as error:
            assert "\n" not in str(error)  # noqa: PT017


def test_zip_that_no_reader_knows(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a/data.pkl", b"\x80\x02}.")
    data = bytearray(buffer.getvalue())
    data[data.rfind(b"PK\x01\x02") + 10] = 97  # a compression that does not exist
    (tmp_path / "x.bin").write_bytes(data)
    with pytest.raises(WeightsError):
        list_pickled(tmp_path / "x.bin")
