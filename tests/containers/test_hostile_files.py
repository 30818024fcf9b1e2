"""Pickled files that run code, or would take much: refused in a sentence, with nothing run or taken."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
import torch

from lib_precision_lora.containers import ContainerError, read_lora
from tests.containers.hostile import DAMAGED, LARGE, RUNNING, marker_of
from tests.containers.process_peak import numbers

REFUSE = """
from lib_precision_lora.containers import ContainerError, read_lora

before, refused = peak(), 0
for path in Path(sys.argv[1]).iterdir():
    try:
        read_lora(path)
    except ContainerError:
        refused += 1
print(refused, peak() - before)
"""
ALL = {**RUNNING, **LARGE, **DAMAGED}


def refusal(path: Path) -> str:
    with pytest.raises(ContainerError) as caught:
        read_lora(path)
    return str(caught.value)


@pytest.mark.parametrize("what", ALL)
def test_it_is_refused_in_a_sentence_and_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write, reason = ALL[what]
    path = tmp_path / "lora.pt"
    write(path)
    before = path.read_bytes()
    with pytest.raises(ContainerError, match=reason) as caught:
        read_lora(path)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert len(sentence) < 500
    assert str(tmp_path) not in sentence
    assert [each.name for each in tmp_path.iterdir()] == ["lora.pt"], "nothing ran, nothing was renamed"
    assert path.read_bytes() == before


@pytest.mark.parametrize("what", ["a command", "a command in the older form"])
def test_the_same_file_does_run_where_it_is_loaded_unsafely(tmp_path: Path, what: str) -> None:
    """Or the test above would show nothing."""
    path = tmp_path / "lora.pt"
    RUNNING[what][0](path)
    torch.load(path, weights_only=False)
    assert marker_of(path).is_dir()


def test_no_loader_of_torch_or_python_has_a_part_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hosts put their own in the place of `torch.load`, and others in that of `pickle`."""
    torch.save({"a": torch.ones(2)}, tmp_path / "new.pt")
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)

    def called(*_: object, **__: object) -> None:
        raise AssertionError("it was called")

    for name in (
        *("torch.load", "torch.serialization._load", "torch.serialization._legacy_load"),
        *(
            "torch._utils._rebuild_tensor_v2",
            "torch._weights_only_unpickler.load",
            "torch.UntypedStorage.from_file",
        ),
        *("pickle.load", "pickle.loads", "pickle.Unpickler", "zipfile.ZipFile"),
    ):
        monkeypatch.setattr(name, called)
    for path in tmp_path.iterdir():
        assert torch.equal(read_lora(path)["a"], torch.ones(2))


@pytest.mark.parametrize("what", LARGE)
def test_nothing_is_allocated_that_the_file_does_not_hold(tmp_path: Path, what: str) -> None:
    """In Python's own memory; of tensors the test below tells."""
    path = tmp_path / "lora.pt"
    LARGE[what][0](path)
    tracemalloc.start()
    try:
        refusal(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100 * 2**20, peak


def test_no_refusal_takes_much_memory_of_the_process(tmp_path: Path) -> None:
    for index, (write, _) in enumerate(LARGE.values()):
        write(tmp_path / f"{index}.pt")
    refused, peak = numbers(REFUSE, tmp_path)
    assert refused == len(LARGE)
    assert peak < 150 * 2**20, peak
