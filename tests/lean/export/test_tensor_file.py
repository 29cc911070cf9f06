"""The runtime's `.tensor` files."""

import struct

import numpy as np
import pytest
import torch

from lean.errors import QuantizationError
from lean.export.tensor_file import read_tensor, write_tensor

# As in the enumeration of the runtime's tensor library.
CODES = {
    "int32": 1,
    "float16": 2,
    "float32": 3,
    "int64": 4,
    "uint64": 5,
    "uint32": 6,
    "int8": 7,
    "uint8": 8,
    "uint16": 9,
    "int16": 10,
}


def test_layout_byte_by_byte(tmp_path):
    write_tensor(tmp_path / "a.tensor", np.array([[1, -2, 3]], np.float16))
    expected = bytes.fromhex("0111ff33 02000000 02000000 01000000 03000000 003c 00c0 0042")
    assert (tmp_path / "a.tensor").read_bytes() == expected


@pytest.mark.parametrize(("name", "code"), CODES.items())
def test_every_type_comes_back(tmp_path, name, code):
    array = np.arange(24).reshape(2, 3, 4).astype(name)
    write_tensor(tmp_path / "a.tensor", array)
    assert struct.unpack_from("<3i", (tmp_path / "a.tensor").read_bytes()) == (0x33FF1101, 3, code)
    back = read_tensor(tmp_path / "a.tensor")
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


@pytest.mark.parametrize("shape", [(), (0, 5), (1,)])
def test_scalars_and_empty_tensors(tmp_path, shape):
    write_tensor(tmp_path / "a.tensor", np.ones(shape, np.float32))
    assert read_tensor(tmp_path / "a.tensor").shape == shape


def test_torch_tensors_and_views_are_written_in_c_order(tmp_path):
    tensor = torch.arange(6, dtype=torch.float32).reshape(2, 3).requires_grad_()
    write_tensor(tmp_path / "a.tensor", tensor.T)
    np.testing.assert_array_equal(read_tensor(tmp_path / "a.tensor"), [[0, 3], [1, 4], [2, 5]])


def test_big_endian_arrays_are_written_little_endian(tmp_path):
    write_tensor(tmp_path / "a.tensor", np.array([1, 2], ">i4"))
    np.testing.assert_array_equal(read_tensor(tmp_path / "a.tensor"), [1, 2])


def test_a_type_without_a_code_is_refused(tmp_path):
    with pytest.raises(QuantizationError, match=r"float64.*float32"):
        write_tensor(tmp_path / "a.tensor", np.zeros(2))
    assert not list(tmp_path.iterdir())


HEAD = struct.pack("<5i", 0x33FF1101, 2, 3, 2, 2)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "magic"),
        (struct.pack("<5i", 1, 2, 3, 2, 2) + bytes(16), "magic"),
        (HEAD + bytes(15), "needs 16 bytes, 15"),
        (HEAD + bytes(17), "needs 16 bytes, 17"),
        (HEAD[:16], "damaged"),
        (struct.pack("<5i", 0x33FF1101, 2, 99, 2, 2) + bytes(16), "type code 99"),
        (struct.pack("<5i", 0x33FF1101, 2, 3, -2, -2) + bytes(16), "damaged"),
        (struct.pack("<3i", 0x33FF1101, -1, 3), "damaged"),
    ],
)
def test_damaged_files_are_refused(tmp_path, content, words):
    (tmp_path / "a.tensor").write_bytes(content)
    with pytest.raises(QuantizationError, match=words):
        read_tensor(tmp_path / "a.tensor")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(QuantizationError, match=r"a\.tensor.*No such file"):
        read_tensor(tmp_path / "a.tensor")


def test_a_folder_that_can_not_be_written_is_refused(tmp_path):
    with pytest.raises(QuantizationError, match="nowhere"):
        write_tensor(tmp_path / "nowhere" / "a.tensor", np.zeros(2, np.int8))
