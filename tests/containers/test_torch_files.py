"""Files of `torch.save` that are in order: the values that went in come out."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lib_precision_lora.containers import PickleError, hashing, read_lora

FORMS: dict[str, dict[str, Any]] = {
    "zip": {},
    "zip, protocol 3": {"pickle_protocol": 3},
    "zip, protocol 4": {"pickle_protocol": 4},
    "zip, protocol 5": {"pickle_protocol": 5},
    "older": {"_use_new_zipfile_serialization": False},
}
TYPES = (
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "float8_e4m3fn",
    "float8_e5m2",
    "int64",
    "uint8",
    "bool",
)


def same(read: Tensor, written: Tensor) -> bool:
    """As values and as they lie in memory; float8 has no comparison of its own."""
    return (
        (read.dtype, read.shape, read.stride()) == (written.dtype, written.shape, written.stride())
        and read.reshape(-1).view(torch.uint8).equal(written.detach().reshape(-1).view(torch.uint8))
        and not read.requires_grad
    )


def tensors() -> dict[str, Tensor]:
    found: dict[str, Tensor] = {f"a.{name}": torch.randn(5, 8).to(getattr(torch, name)) for name in TYPES}
    together = torch.randn(4, 6)
    return {
        **found,
        "transposed": torch.randn(6, 4).T,
        "conv": torch.randn(4, 2, 3, 3).to(memory_format=torch.channels_last),
        "rows of another": together[1:3],
        "columns of another": together[:, 2:],
        "a trained one": nn.Parameter(torch.randn(3)),
        "nothing": torch.empty(0, 4),
        "one": torch.tensor(4.0),
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("at_once", [1, 2**22])
def test_the_values_are_those_that_were_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, at_once: int
) -> None:
    monkeypatch.setattr(hashing, "AT_ONCE", at_once)
    written = tensors()
    torch.save(OrderedDict(written), tmp_path / "lora.pt", **FORMS[form])
    read = read_lora(tmp_path / "lora.pt")
    assert list(read) == list(written)
    wrong = [key for key in written if not same(read[key], written[key])]
    assert not wrong
    digest = hashlib.sha256((tmp_path / "lora.pt").read_bytes()).hexdigest()
    assert (read.digest, read.weights_digest, dict(read.metadata)) == (digest, digest, {})


@pytest.mark.parametrize("form", FORMS)
def test_the_weights_of_a_training_are_found(tmp_path: Path, form: str) -> None:
    """With what Lightning and others keep beside them, as far as it is no class of theirs."""
    model = nn.Linear(3, 2)
    state = model.state_dict()
    torch.save(
        {
            "state_dict": state,
            "epoch": 3,
            "global_step": 2**40,
            "rate": 1e-4,
            "device": torch.device("cpu"),
            "shape": torch.Size([3, 2]),
            "type": torch.float16,
            "names": ["a", ("b", None, True, False)],
            "by number": {0: "a", 1: "b"},
            "set": {1, 2},
        },
        tmp_path / "lora.ckpt",
        **FORMS[form],
    )
    read = read_lora(tmp_path / "lora.ckpt")
    assert set(read) == {"weight", "bias"}
    assert all(same(read[key], state[key]) for key in state)


@pytest.mark.parametrize(("alpha", "value"), [(8, 8.0), (0.5, 0.5), (1e300, 1e300)])
def test_an_alpha_that_is_a_number_is_no_less_than_one_that_is_a_tensor(
    tmp_path: Path, alpha: float, value: float
) -> None:
    torch.save({"a.alpha": alpha, "a.lora_up.weight": torch.ones(2, 2), "a.step": 7}, tmp_path / "lora.pt")
    read = read_lora(tmp_path / "lora.pt")
    assert set(read) == {"a.alpha", "a.lora_up.weight"}
    assert float(read["a.alpha"]) == value


def test_a_parameter_with_state_and_a_shared_storage_are_read(tmp_path: Path) -> None:
    noted = nn.Parameter(torch.randn(2))
    noted.note = "kept by torch, and nothing here"  # type: ignore[attr-defined]
    tied = torch.randn(3, 3)
    torch.save({"noted": noted, "a": tied, "b": tied}, tmp_path / "lora.pt")
    read = read_lora(tmp_path / "lora.pt")
    assert same(read["noted"], noted)
    assert same(read["a"], tied)
    assert read["a"].data_ptr() == read["b"].data_ptr()


def test_what_a_file_holds_is_what_its_storages_take_and_not_what_is_seen_of_them(tmp_path: Path) -> None:
    large = torch.zeros(1000, 256)
    torch.save({"a": large[:3], "b": large[7:9], "c": torch.zeros(5)}, tmp_path / "lora.pt")
    read = read_lora(tmp_path / "lora.pt")
    assert sum(tensor.nbytes for tensor in read.values()) == 5 * 256 * 4 + 20
    assert read.held_bytes == 1000 * 256 * 4 + 20


@pytest.mark.parametrize("form", FORMS)
def test_a_pickle_is_refused_unread_where_none_is_wanted(tmp_path: Path, form: str) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "lora.safetensors", **FORMS[form])
    with pytest.raises(PickleError, match="pickled file, of which nothing is read here"):
        read_lora(tmp_path / "lora.safetensors", pickles=False)
    assert set(read_lora(tmp_path / "lora.safetensors")) == {"a"}, (
        "elsewhere its content counts, not its name"
    )


def test_a_safetensors_file_that_starts_as_a_pickle_is_none(tmp_path: Path) -> None:
    """One header in 32 has a length whose first byte is 0x80, some begin with the letters PK."""
    for length in (0x80, 0x180, 0x4B50):
        text = 0
        while True:
            save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors", {"x": "y" * text})
            now = int.from_bytes((tmp_path / "a.safetensors").read_bytes()[:8], "little")
            if now >= length:
                break
            text += max(1, length - now - 8)
        assert now == length
        assert set(read_lora(tmp_path / "a.safetensors", pickles=False)) == {"a"}
