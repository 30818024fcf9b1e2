"""Which storage types a checkpoint's file can take: what its name and its header tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lib_precision_lora.host.generation.low_bits import objection
from tests.host.headers import FP4, LAYER, NF4, SCALED, T5, write_header
from tests.host.webui import Host

EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.fixture
def card(bare_host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that can quantize to 4 bits."""
    from backend import operations

    monkeypatch.setattr(operations, "bnb_avaliable", True, raising=False)
    monkeypatch.setattr(bare_host.memory, "get_torch_device", lambda: torch.device("cuda"))


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(
    ("names", "refused"),
    [
        ([f"{LAYER}.weight"], []),
        ([NF4], [*EIGHT_BITS, "fp4"]),
        ([FP4], [*EIGHT_BITS, "nf4"]),
        ([NF4.removeprefix("model.diffusion_model.")], [*EIGHT_BITS, "fp4"]),
        ([f"{LAYER}.weight", SCALED], ["nf4", "fp4"]),
        ([f"{LAYER}.weight", f"{LAYER}.comfy_quant"], [*EIGHT_BITS, "nf4", "fp4"]),
        ([f"{LAYER}.weight", f"{T5}.comfy_quant"], []),
        ([f"{LAYER}.weight", f"{T5}.weight.quant_state.bitsandbytes__nf4"], []),
        ([f"{LAYER}.weight", f"{T5}.scale_weight"], []),
    ],
)
def test_a_quantized_model_keeps_its_type_and_its_text_encoder_does_not_count(
    tmp_path: Path, names: list[str], refused: list[Any]
) -> None:
    file = write_header(tmp_path / "flux.safetensors", *names)
    found = [storage for storage in (*EIGHT_BITS, "nf4", "fp4", None) if objection(str(file), storage)]
    assert found == refused


@pytest.mark.usefixtures("card")
def test_metadata_that_cannot_be_read_is_left_to_the_host_as_well(tmp_path: Path) -> None:
    file = tmp_path / "flux.safetensors"
    for text in ("{", "3", "{}", '{"layers": 3}', "[" * 100_000):
        header = json.dumps(
            {"__metadata__": {"_quantization_metadata": text}, f"{LAYER}.weight": {}}
        ).encode()
        file.write_bytes(len(header).to_bytes(8, "little") + header)
        assert objection(str(file), torch.float8_e4m3fn) is None


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(("layer", "refused"), [(LAYER, True), (T5, False)])
def test_layers_that_the_metadata_calls_quantized_count_as_well(
    tmp_path: Path, layer: str, refused: bool
) -> None:
    file = tmp_path / "flux.safetensors"
    layers = json.dumps({"layers": {layer: {"format": "nvfp4"}}})
    header = {"__metadata__": {"_quantization_metadata": layers}, f"{LAYER}.weight": {}, f"{T5}.weight": {}}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    found = objection(str(file), torch.float8_e4m3fn)
    assert found == ("the weights of flux.safetensors are quantized already" if refused else None)


@pytest.mark.usefixtures("card")
def test_a_gguf_file_takes_its_own_type_alone(tmp_path: Path) -> None:
    for name in ("flux.gguf", "FLUX.GGUF"):
        assert objection(str(tmp_path / name), None) is None
        for storage in (*EIGHT_BITS, "nf4", "fp4"):
            assert f"{name} is a GGUF file" in str(objection(str(tmp_path / name), storage))


@pytest.mark.parametrize(
    "content", [None, b"", b"PK", b"\xff" * 64, (9).to_bytes(8, "little") + b"{not json"]
)
def test_what_cannot_be_read_is_left_to_the_host_to_complain_about(
    tmp_path: Path, content: bytes | None
) -> None:
    file = tmp_path / "broken.safetensors"
    if content is not None:
        file.write_bytes(content)
    assert objection(str(file), torch.float8_e4m3fn) is None


@pytest.mark.parametrize(
    ("package", "device", "reason"),
    [(False, "cuda", "bitsandbytes"), (True, "cpu", "runs on cpu"), (True, "cuda", None)],
)
def test_four_bits_need_the_package_and_a_card(
    bare_host: Host,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    package: bool,
    device: str,
    reason: str | None,
) -> None:
    from backend import operations

    monkeypatch.setattr(operations, "bnb_avaliable", package, raising=False)
    monkeypatch.setattr(bare_host.memory, "get_torch_device", lambda: torch.device(device))
    dense = str(write_header(tmp_path / "dense.safetensors", f"{LAYER}.weight"))
    already = str(write_header(tmp_path / "nf4.safetensors", NF4))
    said = objection(dense, "nf4")
    assert said is None if reason is None else reason in str(said)
    assert objection(already, "nf4") is None, "it needs no quantizing"
