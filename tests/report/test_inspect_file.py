"""What `inspect` says of good, odd and damaged LoRA files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lib_precision_lora.report.inspect_file import Inspection, Layer, UnreadableFileError, inspect_file
from lib_precision_lora.report.inspect_text import inspection_text


def lora(name: str, rank: int = 4, alpha: float | None = 2.0) -> dict[str, Tensor]:
    tensors = {
        f"{name}.lora_up.weight": torch.ones(16, rank),
        f"{name}.lora_down.weight": torch.ones(rank, 8, dtype=torch.float16),
    }
    return tensors if alpha is None else {**tensors, f"{name}.alpha": torch.tensor(alpha)}


def inspected(tensors: dict[str, Tensor], folder: Path) -> Inspection:
    save_file(tensors, folder / "lora.safetensors")
    return inspect_file(folder / "lora.safetensors")


def test_layers_ranks_and_alphas_are_those_of_the_file(tmp_path: Path) -> None:
    inspection = inspected({**lora("a"), **lora("b", 8, 2.0), **lora("c", 8, None)}, tmp_path)
    assert set(inspection.layers) == {
        Layer("a", "lora", 4, 2.0, 16 * 4 * 4 + 4 * 8 * 2),
        Layer("b", "lora", 8, 2.0, 16 * 8 * 4 + 8 * 8 * 2),
        Layer("c", "lora", 8, None, 16 * 8 * 4 + 8 * 8 * 2),
    }
    assert (inspection.ranks, inspection.alphas) == ({4: 1, 8: 2}, {2.0: 2})
    assert (inspection.kinds, inspection.layout) == ({"lora": 3}, "kohya")
    assert (inspection.unmatched, inspection.findings) == ((), ())
    assert inspection.nbytes == (tmp_path / "lora.safetensors").stat().st_size


def test_a_layout_without_alphas_is_named(tmp_path: Path) -> None:
    peft = {"t.lora_A.weight": torch.ones(2, 8), "t.lora_B.weight": torch.ones(8, 2)}
    inspection = inspected(peft, tmp_path)
    assert (inspection.layout, inspection.alphas, inspection.findings) == ("PEFT", {}, ())


def test_unmatched_keys_are_listed_and_are_no_finding(tmp_path: Path) -> None:
    inspection = inspected({**lora("a"), "surprise": torch.ones(1)}, tmp_path)
    assert (inspection.unmatched, inspection.findings) == (("surprise",), ())
    assert "surprise" in inspection_text(inspection)


def test_a_part_of_a_layer_that_is_not_understood_is_a_finding(tmp_path: Path) -> None:
    inspection = inspected({**lora("a"), "a.surprise": torch.ones(1)}, tmp_path)
    assert inspection.unmatched == ("a.surprise",)
    (finding,) = inspection.findings
    assert "a.surprise" in finding
    assert f"FINDING  {finding}" in inspection_text(inspection)


def test_alphas_of_the_header_are_shown_and_disagreements_are_findings(tmp_path: Path) -> None:
    header = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 16})}
    save_file(lora("transformer.a", alpha=None), tmp_path / "lora.safetensors", header)
    inspection = inspect_file(tmp_path / "lora.safetensors")
    assert (inspection.alphas, inspection.findings) == ({16.0: 1}, ())
    save_file(lora("transformer.a", alpha=2.0), tmp_path / "lora.safetensors", header)
    inspection = inspect_file(tmp_path / "lora.safetensors")
    assert inspection.alphas == {2.0: 1}
    assert "header says alpha 16" in inspection.findings[0]


def test_alphas_that_scale_nothing_are_no_finding(tmp_path: Path) -> None:
    """ai-toolkit's LoKr of whole factors in fp16; several alphas, and a rank that makes them count."""
    whole = {"a.lokr_w1": torch.ones(2, 2), "a.lokr_w2": torch.ones(2, 2)}
    for alpha in (torch.tensor(9999999999).half(), torch.ones(3)):
        inspection = inspected({**whole, "a.alpha": alpha}, tmp_path)
        assert (inspection.alphas, inspection.findings) == ({}, ())
        json.dumps(inspection.as_object(), allow_nan=False)
    damaged = inspected({**lora("a"), "a.alpha": torch.ones(3)}, tmp_path)
    assert "a: alpha has 3 values" in damaged.findings[0]
    flag = inspected({"a.weight": torch.ones(4), "a.on_input": torch.ones(0)}, tmp_path)
    assert any("a: on_input has 0 values" in finding for finding in flag.findings)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"])
def test_files_in_fp8_are_read(tmp_path: Path, name: str) -> None:
    tensors = {key: value.to(getattr(torch, name)) for key, value in lora("a").items()}
    tensors["a.dora_scale"] = torch.ones(16, 1).to(getattr(torch, name))
    inspection = inspected(tensors, tmp_path)
    assert (inspection.kinds, inspection.alphas, inspection.findings) == ({"dora": 1}, {2.0: 1}, ())


def test_a_form_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    packed = {"transformer_blocks.0.qkv_proj.lora_down": torch.ones(8, 4)}
    (finding,) = inspected(packed, tmp_path).findings
    assert "Nunchaku" in finding
    assert "use the LoRA from which it was converted" in finding


def test_many_unmatched_keys_are_cut_short_in_the_text_only(tmp_path: Path) -> None:
    inspection = inspected({**lora("a"), **{f"x{n}": torch.ones(1) for n in range(50)}}, tmp_path)
    assert len(inspection.unmatched) == 50
    assert "and 30 more; --json lists all" in inspection_text(inspection)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite_are_a_finding_with_key_and_number(
    tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    damaged = lora("a")
    damaged["a.lora_up.weight"] = damaged["a.lora_up.weight"].to(dtype)
    damaged["a.lora_up.weight"][3] = value
    findings = inspected(damaged, tmp_path).findings
    assert findings[0] == "a.lora_up.weight: 4 of 64 values are NaN or inf"


def test_rank_zero_is_a_finding(tmp_path: Path) -> None:
    findings = inspected({**lora("a"), **lora("b", 0)}, tmp_path).findings
    assert any("b.lora_up.weight" in finding and "rank zero" in finding for finding in findings)
    assert any("the file cannot be applied: b" in finding for finding in findings)


def test_half_a_lora_is_a_finding(tmp_path: Path) -> None:
    half = lora("a")
    del half["a.lora_up.weight"]
    assert "lora_up is missing" in inspected(half, tmp_path).findings[0]


def test_a_file_without_a_lora_is_a_finding(tmp_path: Path) -> None:
    inspection = inspected({"conv.weight": torch.ones(4, 4)}, tmp_path)
    assert "none of its 1 keys is understood" in inspection.findings[0]
    assert inspected({}, tmp_path).findings


def test_the_object_is_plain_json_for_good_and_damaged_files(tmp_path: Path) -> None:
    for tensors in (lora("a"), {**lora("a"), "a.alpha": torch.tensor(float("nan"))}):
        parsed = json.loads(json.dumps(inspected(tensors, tmp_path).as_object(), allow_nan=False))
        assert set(parsed) >= {"layout", "kinds", "ranks", "alphas", "layers", "unmatched", "findings"}


@pytest.mark.parametrize("kept", [0, 4, 8, 40, -1])
def test_a_truncated_file_is_refused_in_one_sentence(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "lora.safetensors"
    save_file(lora("a"), path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UnreadableFileError, match=r"empty|truncated") as caught:
        inspect_file(path)
    assert "\n" not in str(caught.value)
    assert "download" in str(caught.value)


@pytest.mark.parametrize("ending", [".pt", ".ckpt", ".bin"])
@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "old"])
def test_a_pickled_file_shows_the_same_facts(tmp_path: Path, ending: str, options: dict[str, bool]) -> None:
    tensors = {**lora("a"), **lora("b", 8, None)}
    torch.save(tensors, tmp_path / f"lora{ending}", **options)
    pickled, plain = (
        inspect_file(tmp_path / f"lora{ending}").as_object(),
        inspected(tensors, tmp_path).as_object(),
    )
    for one in (pickled, plain):
        del one["path"], one["nbytes"]
    assert pickled == plain
    assert len(pickled["layers"]) == 2


def test_a_pickled_file_is_refused_unread_where_that_is_asked_for(tmp_path: Path) -> None:
    torch.save(lora("a"), tmp_path / "lora.pt")
    with pytest.raises(UnreadableFileError, match="pickled file, of which nothing is read here"):
        inspect_file(tmp_path / "lora.pt", pickles=False)
    save_file(lora("a"), tmp_path / "lora.pt")
    assert len(inspect_file(tmp_path / "lora.pt", pickles=False).layers) == 1, "its name alone is no reason"


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFileError, match="no such file"):
        inspect_file(tmp_path / "absent.safetensors")
    with pytest.raises(UnreadableFileError, match="it is a folder"):
        inspect_file(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.safetensors")
        with pytest.raises(UnreadableFileError, match="special file"):
            inspect_file(tmp_path / "pipe.safetensors")
