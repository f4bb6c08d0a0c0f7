"""The files that ship with the package are those that they were."""

import hashlib
from pathlib import Path

import pytest

from moshi_stt.data import data_file

SHA256 = {
    "moonshine-tiny-en/decoder.onnx": "7a4169d692567afdf2a019bd384b9ede23259a0a544b7cea7155bae31e3622fb",
    "moonshine-tiny-en/encoder.onnx": "a4782fd9e57611804b9e47f9b1739fe3f42b1e8790de378592a6d09474fa9dc6",
    "moonshine-tiny-en/int8_probe.onnx": "fa7b07b9a7163ada575267ea1a083f1f5f89d06dd603ae2ccd36ca00fd19be92",
    "moonshine-tiny-en/stem.onnx": "b17aa1db6197eeb8b40637724eeead4840d49c5c7bf27889cee081c93e237479",
    "moonshine-tiny-en/tokenizer.bin": "6884b35fd6377d4c4d32336a0bc152f36b64d1e45b6503683cdc238250a8472d",
    "phrases/mimi.safetensors": "8b5b6004ca50feac3e8890bead1d634dfb73b4e93c3cc07849688fd7a0bcf1d6",
    "phrases/model.safetensors": "73b2d7257131ba67011f72f75b3f458eb9a611890bc60398accbfcf8df0ed7a0",
    "phrases/tokenizer.model": "be166c080dc404bc1f03d03a546d839dfce123b9b5b78b0515db28ac23d5caef",
    "silero-vad/silero_vad.onnx": "6b99cbfd39246b6706f98ec13c7c50c6b299181f2474fa05cbc8046acc274396",
    "speech/beckett.wav": "e5a26b3d29e5b0bc8dbd72c11d16a3808a4ec0ac45b21f12a27d2a2fe5c5ae61",
    "speech/en_austen.flac": "5f18827e7428c3de9df41d46b60728df9b4a3308aedabaf2449630246160d0ef",
    "speech/fr_baudelaire.flac": "82e5039e390f79c80daa66f5039149f7031d4599bb58a5cae990a238408adba4",
}


@pytest.mark.parametrize("name", SHA256)
def test_a_shipped_file(name: str) -> None:
    assert hashlib.sha256(data_file(name).read_bytes()).hexdigest() == SHA256[name]


def test_every_shipped_file_has_its_origin_written_down() -> None:
    folder = data_file("README.md").parent
    told = (folder / "README.md").read_text()
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc", ".md")]
    assert {path.relative_to(folder).as_posix() for path in files if path.name != "LICENSE"} == set(SHA256)
    assert all(Path(name).name in told for name in SHA256)
