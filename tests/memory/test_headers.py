"""A header tells names, shapes, types and places as the formats' own libraries do; bad files are named."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lib_precision_lora.memory.gguf_cursor import MOST_ITEMS
from lib_precision_lora.memory.gguf_header import TYPES
from lib_precision_lora.memory.headers import HeaderError, read_header
from lib_precision_lora.memory.tensors import LONGEST_NAME
from tests.memory.checkpoints import write_hole

DTYPES = ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "uint8", "int64", "bool")


def save_all_types(path: Path) -> dict[str, torch.Tensor]:
    tensors = {
        f"layer.{name}": (torch.arange(2 * (3 + index)) % 2).view(2, -1).to(getattr(torch, name))
        for index, name in enumerate(DTYPES)
    }
    tensors |= {"scalar": torch.tensor(2.0), "nothing": torch.zeros(0, 4)}
    save_file(tensors, path, {"format": "pt"})
    return tensors


def safetensors_bytes(entries: object, data: int = 0) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_a_safetensors_header_gives_shapes_sizes_and_places_of_every_type(tmp_path: Path) -> None:
    tensors = save_all_types(tmp_path / "a.safetensors")
    header = read_header(tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    assert header.layout == "safetensors"
    assert header.metadata == {"format": "pt"}
    assert header.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        found = header.tensors[name]
        assert (found.shape, found.elements) == (tuple(tensor.shape), tensor.numel())
        assert (
            content[found.offset : found.offset + found.nbytes]
            == tensor.view(-1).view(torch.uint8).numpy().tobytes()
        )


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_safetensors_file_is_refused_or_read_as_its_library_does(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.float16)}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content) + 1))])
    try:
        header = read_header(path)
    except HeaderError:
        return
    try:
        with safe_open(path, framework="np") as file:
            expected = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except SafetensorError:
        # The library looks at metadata too, which is of no matter here; the tensors' places are consistent.
        assert sum(tensor.nbytes for tensor in header.tensors.values()) < header.nbytes
        return
    assert {name: tensor.shape for name, tensor in header.tensors.items()} == expected


@pytest.mark.parametrize("length", range(128, 8 * 256 + 129, 256))
def test_a_header_of_any_length_is_no_pickle(tmp_path: Path, length: int) -> None:
    """The low byte of such a length is 0x80, with which pickles begin."""
    text = json.dumps({"a": entry([1], 0, 4)}).encode()
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes(text.ljust(length), 4))
    assert (tmp_path / "a.safetensors").read_bytes()[0] == 0x80
    assert read_header(tmp_path / "a.safetensors").tensors["a"].shape == (1,)


def assert_refused(path: Path, message: str) -> None:
    """In one sentence that names the file."""
    with pytest.raises(HeaderError) as caught:
        read_header(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\x10\0\0", "truncated: it has 3 bytes"),
        (b"\xff" * 64, "above the limit"),
        (bytes(range(1, 200)), "above the limit"),
        (b"PK\x03\x04" + bytes(60), "pickled checkpoint"),
        (b"\x80\x02}q\x00" + bytes(60), "pickled checkpoint"),
        ((1000).to_bytes(8, "little") + b"{}", "truncated: it has 10 bytes, and its header alone 1008"),
        (safetensors_bytes(b"not json"), "header cannot be read"),
        (safetensors_bytes(b"\xff\xfe{}"), "header cannot be read"),
        (safetensors_bytes(b"[1, 2]"), "no JSON object"),
        (safetensors_bytes(b"[" * 100_000), "header cannot be read"),
        (safetensors_bytes(b'{"a": %b, "a": %b}' % ((json.dumps(entry([1], 0, 4)).encode(),) * 2)), "twice"),
        (safetensors_bytes({"a": 1}), "entry for a is no object"),
        (safetensors_bytes({"a": entry([1], 0, 4, "F99")}, 4), "a is of the type F99"),
        (safetensors_bytes({"a": entry([-1], 0, 4)}, 4), "entry for a is not"),
        (safetensors_bytes({"a": entry([1.0], 0, 4)}, 4), "entry for a is not"),  # type: ignore[list-item]
        (safetensors_bytes({"a": entry([2], 0, 4)}, 4), "takes 8 bytes, its place in the file is 0 to 4"),
        (safetensors_bytes({"a": entry([1], 0, 4), "b": entry([1], 2, 6)}, 6), "a and b overlap"),
        (safetensors_bytes({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, 4), "a and b overlap"),
        (safetensors_bytes({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, 12), "accounts for"),
        (safetensors_bytes({"a": entry([1], 0, 4)}, 3), "is truncated: it has"),
        (safetensors_bytes({"a": entry([1], 0, 4)}, 5), "accounts for"),
        (safetensors_bytes({"a": entry([10**9, 10**8], 0, 4 * 10**17)}), "is truncated"),
    ],
)
def test_a_bad_safetensors_file_is_refused_in_one_sentence_that_names_it(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    assert_refused(path, message)


def test_what_is_no_file_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(HeaderError, match="there is no such file"):
        read_header(tmp_path / "absent.safetensors")
    with pytest.raises(HeaderError, match="is a folder"):
        read_header(tmp_path)
    with pytest.raises(HeaderError, match="no regular file"):
        read_header(Path("/dev/null"))


def write_gguf(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_uint32("answer", 42)
    writer.add_array("words", ["a" * index for index in range(200)])
    writer.add_array("numbers", list(range(100)))
    writer.add_array("comfy.gguf.orig_shape.reshaped.weight", [4, 2, 8])
    types = gguf.GGMLQuantizationType
    for name, kind in (("q8", types.Q8_0), ("q4", types.Q4_0), ("q4_k", types.Q4_K), ("q6_k", types.Q6_K)):
        block, size = gguf.GGML_QUANT_SIZES[kind]
        values = np.zeros((6, 512 // block * size), np.uint8)
        writer.add_tensor(f"{name}.weight", values, raw_dtype=kind)
    writer.add_tensor("half", np.zeros((3, 5), np.float16))
    writer.add_tensor("reshaped.weight", np.zeros((8, 8), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_header_agrees_with_the_gguf_package(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_gguf(path)
    header = read_header(path)
    expected = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert header.layout == "GGUF"
    assert header.tensors.keys() == expected.keys()
    assert len(expected) == 6
    for name, tensor in expected.items():
        found = header.tensors[name]
        shape = (4, 2, 8) if name == "reshaped.weight" else tuple(int(n) for n in reversed(tensor.shape))
        assert (found.shape, found.stored) == (shape, tensor.tensor_type.name)
        assert (found.nbytes, found.offset) == (tensor.n_bytes, tensor.data_offset)
    assert header.metadata["answer"] == 42


def test_the_block_sizes_are_those_of_the_gguf_package() -> None:
    known = {int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert len(TYPES) > 25
    for number, sizes in TYPES.items():
        assert known[number] == sizes


def gguf_file(path: Path, content: bytes, data: int) -> Path:
    """The header, and so many bytes from the next multiple of the alignment on."""
    path.write_bytes(content.ljust(-(-len(content) // 32) * 32, b"\0") + bytes(data))
    return path


def test_a_type_that_the_gguf_package_alone_knows_is_read(tmp_path: Path) -> None:
    known = {int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert "MXFP4" in {name for number, (name, _, _) in known.items() if number not in TYPES}
    for number, (name, block, block_bytes) in known.items():
        info = gguf_text(b"a") + struct.pack("<IQQIQ", 2, 2 * block, 3, number, 0)
        path = gguf_file(tmp_path / "a.gguf", gguf_start(3, 1, rest=info), 6 * block_bytes)
        tensor = read_header(path).tensors["a"]
        assert (tensor.stored, tensor.shape, tensor.nbytes) == (name, (3, 2 * block), 6 * block_bytes)


def test_a_type_of_the_gguf_package_is_refused_by_number_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = gguf_text(b"a") + struct.pack("<IQIQ", 1, 32, 39, 0)
    path = gguf_file(tmp_path / "a.gguf", gguf_start(3, 1, rest=info), 17)
    assert read_header(path).tensors["a"].stored == "MXFP4"
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert_refused(path, "a is of GGUF type 39, which is not known here")


@pytest.mark.parametrize("more", [0, 1])
def test_a_gguf_name_is_read_up_to_the_bound(tmp_path: Path, more: int) -> None:
    name = b"a" * (LONGEST_NAME + more)
    info = gguf_text(name) + struct.pack("<IQIQ", 1, 1, 0, 0)
    path = gguf_file(tmp_path / "a.gguf", gguf_start(3, 1, rest=info), 4)
    if more:
        assert_refused(path, f"a name in its header has {len(name)} bytes")
    else:
        assert list(read_header(path).tensors) == [name.decode()]


@pytest.mark.parametrize("more", [0, 1])
def test_the_texts_of_a_large_tokenizer_are_passed_over_up_to_the_bound(tmp_path: Path, more: int) -> None:
    count = MOST_ITEMS + more
    words = gguf_text(b"words") + struct.pack("<IIQ", 9, 8, count) + bytes(8 * count)
    answer = gguf_text(b"answer") + struct.pack("<II", 4, 42)
    path = gguf_file(tmp_path / "a.gguf", gguf_start(3, values=2, rest=words + answer), 0)
    if more:
        assert_refused(path, f"more than {MOST_ITEMS} values")
    else:
        assert read_header(path).metadata == {"words": None, "answer": 42}


def gguf_start(version: int, tensors: int = 0, values: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values) + rest


def gguf_text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gguf_start(1), "GGUF version is 1"),
        (gguf_start(4), "GGUF version is 4"),
        (b"GGUF\0\0\0\x03" + bytes(16), "GGUF version is"),
        (b"GGUF\x03\0\0\0", "truncated"),
        (gguf_start(3, tensors=1), "truncated"),
        (gguf_start(3, tensors=2**60), "truncated"),
        (gguf_start(3, values=1, rest=struct.pack("<Q", 2**60)), "truncated"),
        (gguf_start(3, values=1, rest=gguf_text(b"a") + struct.pack("<I", 99)), "unknown type 99"),
        (
            gguf_start(
                3, values=1, rest=gguf_text(b"a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 20
            ),
            "unknown type 9",
        ),
        (
            gguf_start(3, values=1, rest=gguf_text(b"general.alignment") + struct.pack("<II", 4, 0)),
            "alignment of 0",
        ),
        (gguf_start(3, 1, rest=gguf_text(b"a") + struct.pack("<I", 99) + bytes(2000)), "99 axes"),
        (
            gguf_start(3, 1, rest=gguf_text(b"a") + struct.pack("<IQIQ", 1, 32, 99, 0) + bytes(99)),
            "GGUF type 99",
        ),
        (
            gguf_start(3, 1, rest=gguf_text(b"a") + struct.pack("<IQIQ", 1, 31, 8, 0) + bytes(99)),
            "31 columns",
        ),
        (
            gguf_start(3, 1, rest=gguf_text(b"a") + struct.pack("<IQIQ", 1, 32 * 9, 8, 0) + bytes(99)),
            "truncated",
        ),
        (
            gguf_start(3, 2, rest=(gguf_text(b"a") + struct.pack("<IQIQ", 1, 32, 8, 0)) * 2 + bytes(99)),
            "twice",
        ),
        (
            gguf_start(
                3,
                2,
                rest=b"".join(gguf_text(n) + struct.pack("<IQIQ", 1, 32, 8, 0) for n in (b"a", b"b"))
                + bytes(99),
            ),
            "overlap",
        ),
    ],
)
def test_a_bad_gguf_file_is_refused_in_one_sentence_that_names_it(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    assert_refused(path, message)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_damaged_gguf_file_is_read_or_refused_and_never_fails_otherwise(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole, path = (tmp_path_factory.getbasetemp() / name for name in ("whole.gguf", "damaged.gguf"))
    if not whole.exists():
        write_gguf(whole)
    content = bytearray(whole.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(4, 1500))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        tensors = read_header(path).tensors.values()
    except HeaderError:
        return
    assert all(tensor.offset + tensor.nbytes <= path.stat().st_size for tensor in tensors)


def test_a_long_text_in_the_place_of_a_number_is_shortened_in_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    text = gguf_text(b"general.alignment") + struct.pack("<I", 8) + gguf_text(b"x" * 60_000)
    path.write_bytes(gguf_start(3, values=1, rest=text))
    with pytest.raises(HeaderError, match="an alignment of xxx") as caught:
        read_header(path)
    assert len(str(caught.value).removeprefix(str(path))) < 200


def test_a_damaged_count_does_not_read_on_through_twelve_gigabytes(tmp_path: Path) -> None:
    path = tmp_path / "large.gguf"
    for rest in (b"", struct.pack("<Q", 6 * 10**9)):
        with path.open("wb") as file:
            file.write(gguf_start(3, 2**40, len(rest) // 8, rest))
            file.truncate(12 * 10**9)
        with pytest.raises(HeaderError, match="beyond"):
            read_header(path)


def test_a_file_of_twelve_gigabytes_is_known_from_its_header(tmp_path: Path) -> None:
    path = write_hole(
        tmp_path / "a.safetensors", {"a": ("BF16", (60000, 50000)), "b": ("BF16", (60000, 50000))}
    )
    header = read_header(path)
    assert header.nbytes > 12 * 10**9
    assert header.tensors["b"].shape == (60000, 50000)
