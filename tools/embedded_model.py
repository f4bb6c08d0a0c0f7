"""Makes the files of the embedded English model that ship in src/moshi_stt/data, from the wheel that its makers publish.

    pip download --no-deps --platform macosx_15_0_arm64 --only-binary :all: -d FOLDER moonshine-voice==0.0.73
    python tools/embedded_model.py FOLDER/moonshine_voice-0.0.73-*.whl        # needs: onnx, onnxruntime

The model files are the same in the wheels of all platforms, and the SHA-256 of each is checked. Encoder and tokenizer are
copied. The decoder gets one more output, `cross_attention` (B, L * H, T, S): how much each of the T tokens attends to each of
the S encoder frames, in each of the H heads of each of the L layers; word times come from it where pocketsphinx has no wheel.
Nothing else is changed: the same operators in the same order, so logits are equal bit for bit.
"""

import argparse
import hashlib
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper
from onnxruntime.tools.ort_format_model.ort_flatbuffers_py.fbs import InferenceSession

OUT = Path(__file__).parents[1] / "src" / "moshi_stt" / "data"

SOURCES = {
    "tiny-en/encoder_model.ort": "94e90a4654fc45cdfedb77c4c08e1739f48862998e58fada384b25118134f221",
    "tiny-en/decoder_model_merged.ort": "cf524c4862d36e9e5ab032eddc73637efd822d70e868ac575cf1a46e1e4708a0",
    "tiny-en/tokenizer.bin": "6884b35fd6377d4c4d32336a0bc152f36b64d1e45b6503683cdc238250a8472d",
}
"""SHA-256 of the files in the wheel."""

ATTENTION = "cross_attention"
LAYERS = 6


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheel", type=Path)
    args = parser.parse_args()
    target = OUT / "moonshine-tiny-en"
    target.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(args.wheel) as wheel:
        files = {name: wheel.read(f"moonshine_voice/assets/{name}") for name in SOURCES}
        licence = next(name for name in wheel.namelist() if name.endswith("/licenses/LICENSE"))
        (target / "LICENSE").write_bytes(wheel.read(licence))
    for name, data in files.items():
        found = hashlib.sha256(data).hexdigest()
        if found != SOURCES[name]:
            sys.exit(f"{name} has the SHA-256 {found}, expected {SOURCES[name]}")
    (target / "encoder_model.ort").write_bytes(files["tiny-en/encoder_model.ort"])
    (target / "tokenizer.bin").write_bytes(files["tiny-en/tokenizer.bin"])
    model = read_ort(files["tiny-en/decoder_model_merged.ort"])
    add_attention(model)
    write_ort(model, target / "decoder_model_merged.ort")
    for path in sorted(target.iterdir()):
        print(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(OUT)}")
    return 0


# ---- the ORT format, back to ONNX ---------------------------------------------------------------------------------------


def read_ort(data: bytes) -> Any:
    """An ORT-format model (FlatBuffers) as an ONNX ModelProto."""
    source = InferenceSession.InferenceSession.GetRootAs(data, 0).Model()
    imports = [source.OpsetImport(i) for i in range(source.OpsetImportLength())]
    opsets = [helper.make_opsetid(_text(entry.Domain()), entry.Version()) for entry in imports]
    model = helper.make_model(_graph(source.Graph(), "decoder"), opset_imports=opsets)
    model.ir_version = source.IrVersion()
    return model


def _text(value: bytes | None) -> str:
    return (value or b"").decode()


def _graph(source: Any, name: str) -> Any:
    types = {}
    for i in range(source.NodeArgsLength()):
        argument = source.NodeArgs(i)
        types[_text(argument.Name())] = _value(argument)
    inputs = [types[_text(source.Inputs(i))] for i in range(source.InputsLength())]
    outputs = [types[_text(source.Outputs(i))] for i in range(source.OutputsLength())]
    nodes = {source.Nodes(i).Index(): _node(source.Nodes(i)) for i in range(source.NodesLength())}
    tensors = [_tensor(source.Initializers(i)) for i in range(source.InitializersLength())]
    made = {tensor.name for tensor in tensors}
    ordered = _in_order(list(nodes.values()), made | {value.name for value in inputs})
    return helper.make_graph(ordered, name, [v for v in inputs if v.name not in made], outputs, tensors)


def _in_order(nodes: list[Any], known: set[str]) -> list[Any]:
    """Nodes sorted so that each stands after those whose outputs it takes (names from an outer graph count as known)."""
    made_here = {output for node in nodes for output in node.output}
    ordered, left = [], list(nodes)
    while left:
        ready = [node for node in left if all(name in known or name not in made_here for name in node.input)]
        assert ready, "the graph has a circle"
        ordered += ready
        known = known | {output for node in ready for output in node.output}
        left = [node for node in left if node not in ready]
    return ordered


def _value(argument: Any) -> Any:
    from onnxruntime.tools.ort_format_model.ort_flatbuffers_py.fbs import TensorTypeAndShape

    info = argument.Type()
    tensor = TensorTypeAndShape.TensorTypeAndShape()
    if info is None or info.Value() is None:
        return helper.make_empty_tensor_value_info(_text(argument.Name()))
    tensor.Init(info.Value().Bytes, info.Value().Pos)
    shape: list[Any] | None = None
    if tensor.Shape() is not None:
        shape = []
        for i in range(tensor.Shape().DimLength()):
            dim = tensor.Shape().Dim(i).Value()
            shape.append(_text(dim.DimParam()) or (dim.DimValue() if dim.DimType() == 1 else None))
    return helper.make_tensor_value_info(_text(argument.Name()), tensor.ElemType(), shape)


def _tensor(source: Any) -> Any:
    tensor = TensorProto(name=_text(source.Name()), data_type=source.DataType())
    tensor.dims.extend(source.Dims(i) for i in range(source.DimsLength()))
    tensor.raw_data = source.RawDataAsNumpy().tobytes() if source.RawDataLength() else b""
    return tensor


def _node(source: Any) -> Any:
    node = helper.make_node(
        _text(source.OpType()),
        [_text(source.Inputs(i)) for i in range(source.InputsLength())],
        [_text(source.Outputs(i)) for i in range(source.OutputsLength())],
        _text(source.Name()),
        domain=_text(source.Domain()),
    )
    for i in range(source.AttributesLength()):
        node.attribute.append(_attribute(source.Attributes(i)))
    return node


def _attribute(source: Any) -> Any:
    name, kind = _text(source.Name()), source.Type()
    values = {
        1: source.F,
        2: source.I,
        3: source.S,
        4: lambda: _tensor(source.T()),
        5: lambda: _graph(source.G(), name),
        6: lambda: [source.Floats(i) for i in range(source.FloatsLength())],
        7: lambda: [source.Ints(i) for i in range(source.IntsLength())],
        8: lambda: [source.Strings(i) for i in range(source.StringsLength())],
    }
    return helper.make_attribute(name, values[kind](), attr_type=kind)


# ---- the further output -------------------------------------------------------------------------------------------------


def add_attention(model: Any) -> None:
    """Give both branches, and the model, the cross attention of all layers as an output."""
    choice = next(node for node in model.graph.node if node.op_type == "If")
    for attribute in choice.attribute:
        branch = attribute.g
        heads = [f"/model/decoder/layers.{layer}/encoder_attn/Softmax_output_0" for layer in range(LAYERS)]
        made = {output for node in branch.node for output in node.output}
        assert made.issuperset(heads), "the decoder has no such attention"
        name = f"{ATTENTION}_{attribute.name}"
        branch.node.append(helper.make_node("Concat", heads, [name], name, axis=1))
        branch.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None, None, None]))
    choice.output.append(ATTENTION)
    model.graph.output.append(helper.make_tensor_value_info(ATTENTION, TensorProto.FLOAT, [None, None, None, None]))


def write_ort(model: Any, path: Path) -> None:
    """Save in the ORT format without optimising again, so that every result stays what it was."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.optimized_model_filepath = str(path)
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    assert np.little_endian
    sys.exit(main())
