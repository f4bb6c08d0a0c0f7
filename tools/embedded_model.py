"""Makes the files of the embedded English model that ship in src/moshi_stt/data, from the wheel that its makers publish.

    pip download --no-deps --platform macosx_15_0_arm64 --only-binary :all: -d FOLDER moonshine-voice==0.0.73
    python tools/embedded_model.py FOLDER/moonshine_voice-0.0.73-*.whl        # needs: onnx, onnxruntime

The model files are the same in the wheels of all platforms, and the SHA-256 of each is checked. The tokenizer is copied. The
weights keep their values, the graphs are written again for speed:

* Weights are signed bytes rather than unsigned ones (128 less, and so are their zero points: products stay the same integers).
  onnxruntime multiplies these three times as fast on processors that have VNNI instructions; `int8_probe.onnx` tells whether
  a processor has them, see models/embedded.py.
* Rotary embedding and self attention are one operator each, without masks: there is one stretch of audio, all of it valid.
* The encoder's first two convolutions, a third of its work, are a graph of their own: each of their frames hears 32 ms,
  so that of a segment that has grown only the new part needs them.
* The encoder's last step is what the decoder attends to, keys and values of each layer, so that it is computed once a stretch.
* The decoder has one branch, for any number of tokens after any number of earlier ones, and computes logits only from a
  given token on. Its second output, `cross_attention` (B, L * H, T, S), is how much each of the T tokens attends to each of the
  S encoder frames, in each of the H heads of each of the L layers; word times come from it where pocketsphinx has no wheel.
"""

import argparse
import hashlib
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.tools.ort_format_model.ort_flatbuffers_py.fbs import InferenceSession

OUT = Path(__file__).parents[1] / "src" / "moshi_stt" / "data"

SOURCES = {
    "tiny-en/encoder_model.ort": "94e90a4654fc45cdfedb77c4c08e1739f48862998e58fada384b25118134f221",
    "tiny-en/decoder_model_merged.ort": "cf524c4862d36e9e5ab032eddc73637efd822d70e868ac575cf1a46e1e4708a0",
    "tiny-en/tokenizer.bin": "6884b35fd6377d4c4d32336a0bc152f36b64d1e45b6503683cdc238250a8472d",
}
"""SHA-256 of the files in the wheel."""

LAYERS, HEADS, HEAD_DIM, VOCABULARY = 6, 8, 36, 32_768
DIM = HEADS * HEAD_DIM
SPLIT, SWAP = (0, 0, HEADS, HEAD_DIM), (0, 2, 1, 3)
"""(1, T, H * D) to (1, T, H, D), and that to (1, H, T, D)."""

ROTARY_DIM, ROTARY_BASE = 32, 10_000
ENCODER_FRAMES, DECODER_TOKENS = 2_048, 512
"""The longest audio, in frames of 24 ms, and the longest text that the tables of rotary embedding reach."""

EPSILON = 1e-5
OPSET, IR_VERSION = 17, 8
"""Old enough for every onnxruntime that we take."""

MS = "com.microsoft"
EVERYTHING = 2**31 - 1


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
    encoder, decoder = (Source(files[f"tiny-en/{name}.ort"]) for name in ("encoder_model", "decoder_model_merged"))
    (target / "tokenizer.bin").write_bytes(files["tiny-en/tokenizer.bin"])
    (target / "stem.onnx").write_bytes(build_stem(encoder))
    (target / "encoder.onnx").write_bytes(build_encoder(encoder, decoder))
    (target / "decoder.onnx").write_bytes(build_decoder(decoder))
    (target / "int8_probe.onnx").write_bytes(build_probe())
    for path in sorted(target.iterdir()):
        print(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(OUT)}")
    return 0


# ---- the ORT format ------------------------------------------------------------------------------------------------------


DTYPES = {TensorProto.FLOAT: "<f4", TensorProto.UINT8: "u1", TensorProto.INT64: "<i8", TensorProto.INT32: "<i4"}


class Source:
    """Tensors and nodes of an ORT-format model (FlatBuffers), by name, those of the branches of an `If` included."""

    def __init__(self, data: bytes) -> None:
        self.tensors: dict[str, np.ndarray[Any, Any]] = {}
        self.inputs: dict[str, list[str]] = {}
        """Of each node, the names of its inputs."""
        self.types: dict[str, str] = {}
        """Of each node, its operator."""
        for graph in _graphs(InferenceSession.InferenceSession.GetRootAs(data, 0).Model().Graph()):
            for index in range(graph.InitializersLength()):
                self._read_tensor(graph.Initializers(index))
            for index in range(graph.NodesLength()):
                node = graph.Nodes(index)
                self.inputs[_text(node.Name())] = [_text(node.Inputs(i)) for i in range(node.InputsLength())]
                self.types[_text(node.Name())] = _text(node.OpType())

    def _read_tensor(self, tensor: Any) -> None:
        dims = [tensor.Dims(i) for i in range(tensor.DimsLength())]
        raw = tensor.RawDataAsNumpy() if tensor.RawDataLength() else np.zeros(0, np.uint8)
        self.tensors[_text(tensor.Name())] = raw.view(DTYPES[tensor.DataType()]).reshape(dims)

    def tensor(self, node: str, index: int) -> np.ndarray[Any, Any]:
        """The constant that is the node's input of that index."""
        return self.tensors[self.inputs[node][index]]

    def only(self, operator: str) -> str:
        """The first node of that operator."""
        return next(name for name, kind in self.types.items() if kind == operator)


def _graphs(graph: Any) -> Iterator[Any]:
    yield graph
    for index in range(graph.NodesLength()):
        node = graph.Nodes(index)
        for i in range(node.AttributesLength()):
            if node.Attributes(i).G() is not None:
                yield from _graphs(node.Attributes(i).G())


def _text(value: bytes | None) -> str:
    return (value or b"").decode()


# ---- the graphs -----------------------------------------------------------------------------------------------------------


class Network:
    """An ONNX graph that is being written."""

    def __init__(self, rotary_length: int = 0) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        if not rotary_length:
            return
        frequencies = (1.0 / ROTARY_BASE ** (np.arange(0, ROTARY_DIM, 2) / ROTARY_DIM)).astype(np.float32)
        angles = np.arange(rotary_length, dtype=np.float32)[:, None] * frequencies
        self.constant("cos", np.cos(angles))
        self.constant("sin", np.sin(angles))

    def constant(self, name: str, value: Any) -> str:
        self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def integers(self, *values: int) -> str:
        return self.constant("_".join(["ints", *map(str, values)]), np.array(values, np.int64))

    def integer(self, value: int) -> str:
        return self.constant(f"int_{value}", np.array(value, np.int64))

    def add(self, operator: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **attributes: Any) -> None:
        self.nodes.append(helper.make_node(operator, inputs, outputs, domain=domain, **attributes))

    def op(self, operator: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        output = f"{operator}_{len(self.nodes)}"
        self.add(operator, inputs, [output], domain, **attributes)
        return output

    def length(self, value: str, axis: int) -> str:
        return self.op("Gather", self.op("Shape", value), self.integer(axis), axis=0)

    def positions(self, start: str, stop: str) -> str:
        """(1, T): the whole numbers from start to stop, less one."""
        return self.op("Unsqueeze", self.op("Range", start, stop, self.integer(1)), self.integers(0))

    def norm(self, source: Source, value: str, node: str, name: str) -> str:
        """A layer normalisation; its bias is zero."""
        weight = self.constant(f"{name}.weight", source.tensor(node, 1))
        return self.op("LayerNormalization", value, weight, epsilon=EPSILON)

    def weights(self, source: Source, node: str, name: str) -> list[str]:
        """Weights (K, N), scale, zero point and, where there is one, bias of a quantized product."""
        weight, scale, zero = (1, 3, 5) if source.types[node] == "MatMulIntegerToFloat" else (1, 2, 3)
        made = [
            self.constant(f"{name}.weight", signed(source.tensor(node, weight))),
            self.constant(f"{name}.scale", source.tensor(node, scale)),
            self.constant(f"{name}.zero", signed(source.tensor(node, zero))),
        ]
        if source.types[node] == "DynamicQuantizeMatMul" and source.inputs[node][4]:
            made.append(self.constant(f"{name}.bias", source.tensor(node, 4)))
        return made

    def linear(self, source: Source, value: str, node: str, name: str) -> str:
        return self.op("DynamicQuantizeMatMul", value, *self.weights(source, node, name), domain=MS)

    def linears(self, source: Source, value: str, nodes: Sequence[str], names: Sequence[str]) -> list[str]:
        """Several products of one value, which is quantized once."""
        quantized, scale, zero = (f"{names[0]}.input_{part}" for part in ("quantized", "scale", "zero"))
        self.add("DynamicQuantizeLinear", [value], [quantized, scale, zero])
        made = []
        for node, name in zip(nodes, names, strict=True):
            weight, weight_scale, weight_zero = self.weights(source, node, name)
            inputs = (quantized, weight, scale, weight_scale, zero, weight_zero)
            made.append(self.op("MatMulIntegerToFloat", *inputs, domain=MS))
        return made

    def rotary(self, value: str, positions: str) -> str:
        settings = {"interleaved": 1, "rotary_embedding_dim": ROTARY_DIM, "num_heads": HEADS}
        return self.op("RotaryEmbedding", value, positions, "cos", "sin", domain=MS, **settings)

    def projections(self, source: Source, value: str, prefix: str, name: str, positions: str) -> tuple[str, str, str]:
        """Queries, keys and values of self attention, each (1, T, H * D)."""
        nodes = [f"{prefix}self_attn/{part}_proj/MatMul_quant" for part in "qkv"]
        q, k, v = self.linears(source, value, nodes, [f"{name}self_attn.{part}" for part in "qkv"])
        return self.rotary(q, positions), self.rotary(k, positions), v

    def split_heads(self, value: str) -> str:
        """(1, T, H * D) to (1, H, T, D)."""
        return self.op("Transpose", self.op("Reshape", value, self.integers(*SPLIT)), perm=SWAP)

    def serialise(self, name: str, inputs: Sequence[Any], outputs: Sequence[Any]) -> bytes:
        return serialise(helper.make_graph(self.nodes, name, inputs, outputs, list(self.constants.values())))


def serialise(graph: Any) -> bytes:
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(MS, 1)]
    data: bytes = helper.make_model(graph, opset_imports=imports, ir_version=IR_VERSION).SerializeToString()
    return data


def signed(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """uint8 of any shape to int8, each 128 less."""
    return (values ^ 0x80).view(np.int8)


def floats(name: str, *shape: int | str) -> Any:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def cache_names(kind: str) -> list[str]:
    return [f"{kind}.{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value")]


def build_stem(source: Source) -> bytes:
    """samples (1, 1, S) to convolved (1, C, T), the second convolution of the first one's F frames, and their sums.

    The group normalisation between the two spans all of the audio, so it is left to the encoder: its scale is part of the
    weights here, and sums (1, F) and squares (1, F), over the channels, give its mean and variance.
    """
    net = Network()
    first, second = "/conv1/Conv", "/conv2/Conv"
    value = net.op("Tanh", net.op("Conv", "samples", net.constant("conv1.weight", source.tensor(first, 1)), strides=[64]))
    net.add("ReduceSum", [value, net.integers(1)], ["sums"], keepdims=0)
    net.add("ReduceSumSquare", [value], ["squares"], axes=[1], keepdims=0)
    weight = source.tensor(second, 1) * _group_norm(source, "Mul")[:, None]  # (O, C, K)
    net.add("Conv", [value, net.constant("conv2.weight", weight)], ["convolved"], strides=[3])
    outputs = [floats("convolved", 1, 2 * DIM, "T"), floats("sums", 1, "F"), floats("squares", 1, "F")]
    return net.serialise("stem", [floats("samples", 1, 1, "S")], outputs)


def _group_norm(source: Source, operator: str) -> np.ndarray[Any, Any]:
    return source.tensor(f"/groupnorm/{operator}", 1).ravel()


def _normalise(net: Network, source: Source) -> str:
    """What `build_stem` left out: mean and bias; and the last convolution. (1, T, C)."""
    second, third = "/conv2/Conv", "/conv3/Conv"
    weight = source.tensor(second, 1).astype(np.float64)
    gain = np.einsum("ock,c->o", weight, _group_norm(source, "Mul")).astype(np.float32)[:, None]
    bias = source.tensor(second, 2) + np.einsum("ock,c->o", weight, _group_norm(source, "Add")).astype(np.float32)
    drift = net.op("Mul", net.op("Mul", "mean", "inverse"), net.constant("conv2.gain", gain))
    offset = net.op("Sub", net.constant("conv2.bias", bias[:, None]), drift)
    value = net.op("Gelu", net.op("Add", net.op("Mul", "convolved", "inverse"), offset), domain=MS)
    constants = (net.constant(f"conv3.{name}", source.tensor(third, i)) for name, i in (("weight", 1), ("bias", 2)))
    value = net.op("Gelu", net.op("Conv", value, *constants, strides=[2]), domain=MS)
    return net.op("Transpose", value, perm=[0, 2, 1])


def build_encoder(source: Source, decoder: Source) -> bytes:
    """convolved (1, C, T), and mean (1,) and inverse (1,) standard deviation of what was convolved,

    to cross.L.key and cross.L.value (1, H, T, D) of each decoder layer L.
    """
    net = Network(ENCODER_FRAMES)
    value = _normalise(net, source)
    positions = net.positions(net.integer(0), net.length(value, 1))
    for layer in range(LAYERS):
        prefix, name = f"/layers.{layer}/", f"layers.{layer}."
        rest = net.norm(source, value, f"{prefix}input_layernorm/LayerNormalization", f"{name}norm")
        q, k, v = net.projections(source, rest, prefix, name, positions)
        rest = net.op("MultiHeadAttention", q, k, v, domain=MS, num_heads=HEADS)
        value = net.op("Add", value, net.linear(source, rest, f"{prefix}self_attn/o_proj/MatMul_quant", f"{name}self_attn.o"))
        rest = net.norm(source, value, f"{prefix}post_attention_layernorm/LayerNormalization", f"{name}mlp_norm")
        rest = net.op("Gelu", net.linear(source, rest, f"{prefix}mlp/fc1/MatMul_quant", f"{name}fc1"), domain=MS)
        value = net.op("Add", value, net.linear(source, rest, f"{prefix}mlp/fc2/MatMul_quant", f"{name}fc2"))
    last = source.tensor(source.only("SkipLayerNormalization"), 2)
    value = net.op("LayerNormalization", value, net.constant("norm.weight", last), epsilon=EPSILON)
    parts = [(layer, part) for layer in range(LAYERS) for part in "kv"]
    nodes = [f"/model/decoder/layers.{layer}/encoder_attn/{part}_proj/MatMul_quant" for layer, part in parts]
    names = [f"cross.{layer}.{part}" for layer, part in parts]
    for output, name in zip(net.linears(decoder, value, nodes, names), cache_names("cross"), strict=True):
        net.add("Transpose", [net.op("Reshape", output, net.integers(*SPLIT))], [name], perm=SWAP)
    outputs = [floats(name, 1, HEADS, "T", HEAD_DIM) for name in cache_names("cross")]
    return net.serialise("encoder", [floats("convolved", 1, 2 * DIM, "T"), floats("mean", 1), floats("inverse", 1)], outputs)


def build_decoder(source: Source) -> bytes:
    """tokens (1, T) that follow past.L.key and past.L.value (1, H, P, D), and cross.*, to logits (1, T - first, V).

    present.* are the caches with the tokens added; cross_attention is (1, L * H, T, S).
    """
    net = Network(DECODER_TOKENS)
    table, quantized = net.constant("embed.weight", source.tensors[EMBEDDING]), source.only("DequantizeLinear")
    scale, zero = (net.constant(f"embed.{name}", source.tensor(quantized, i)) for name, i in (("scale", 1), ("zero", 2)))
    value = net.op("DequantizeLinear", net.op("Gather", table, "tokens", axis=0), scale, zero)
    past = net.length("past.0.key", 2)
    positions = net.positions(past, net.op("Add", past, net.length("tokens", 1)))
    attentions = []
    for layer in range(LAYERS):
        prefix, name = f"/model/decoder/layers.{layer}/", f"layers.{layer}."
        rest = net.norm(source, value, f"{prefix}input_layernorm/LayerNormalization", f"{name}norm")
        q, k, v = net.projections(source, rest, prefix, name, positions)
        caches, rest = [f"{layer}.key", f"{layer}.value"], f"{name}attended"
        inputs = [q, k, v, "", "", "", *(f"past.{cache}" for cache in caches)]
        outputs = [rest, *(f"present.{cache}" for cache in caches)]
        net.add("MultiHeadAttention", inputs, outputs, MS, num_heads=HEADS, unidirectional=1)
        value = net.op("Add", value, net.linear(source, rest, f"{prefix}self_attn/o_proj/MatMul_quant", f"{name}self_attn.o"))
        rest = net.norm(source, value, f"{prefix}post_attention_layernorm/LayerNormalization", f"{name}cross_norm")
        q = net.split_heads(net.linear(source, rest, f"{prefix}encoder_attn/q_proj/MatMul_quant", f"{name}cross.q"))
        scores = net.op("FusedMatMul", q, f"cross.{layer}.key", domain=MS, transB=1, alpha=HEAD_DIM**-0.5)
        attentions.append(net.op("Softmax", scores, axis=-1))
        rest = net.op("Transpose", net.op("MatMul", attentions[-1], f"cross.{layer}.value"), perm=SWAP)
        rest = net.op("Reshape", rest, net.integers(0, 0, DIM))
        value = net.op("Add", value, net.linear(source, rest, f"{prefix}encoder_attn/o_proj/MatMul_quant", f"{name}cross.o"))
        rest = net.norm(source, value, f"{prefix}final_layernorm/LayerNormalization", f"{name}mlp_norm")
        both, halves = net.linear(source, rest, f"{prefix}mlp/fc1/MatMul_quant", f"{name}fc1"), [f"{name}up", f"{name}gate"]
        net.add("Split", [both], halves, axis=-1)
        rest = net.op("Mul", halves[0], net.op("QuickGelu", halves[1], domain=MS, alpha=1.0))
        value = net.op("Add", value, net.linear(source, rest, f"{prefix}mlp/fc2/MatMul_quant", f"{name}fc2"))
    value = net.op("Slice", value, "first", net.integers(EVERYTHING), net.integers(1))
    value = net.norm(source, value, "/model/decoder/norm/LayerNormalization", "norm")
    net.add("DynamicQuantizeMatMul", [value, *net.weights(source, "/proj_out/MatMul_quant", "out")], ["logits"], MS)
    net.add("Concat", attentions, ["cross_attention"], axis=1)
    inputs = [
        helper.make_tensor_value_info("tokens", TensorProto.INT64, (1, "T")),
        helper.make_tensor_value_info("first", TensorProto.INT64, (1,)),
    ]
    inputs += [floats(name, 1, HEADS, "P", HEAD_DIM) for name in cache_names("past")]
    inputs += [floats(name, 1, HEADS, "S", HEAD_DIM) for name in cache_names("cross")]
    outputs = [floats("logits", 1, "N", VOCABULARY)]
    outputs += [floats(name, 1, HEADS, "Q", HEAD_DIM) for name in cache_names("present")]
    outputs.append(floats("cross_attention", 1, LAYERS * HEADS, "T", "S"))
    return net.serialise("decoder", inputs, outputs)


EMBEDDING = "model.decoder.embed_tokens.weight_merged_0_quantized"
"""(V, C), uint8."""


def build_probe() -> bytes:
    """left (8, 64) of unsigned bytes times a constant of 127s: each sum is 127 times that of the row, where it is exact."""
    weight = numpy_helper.from_array(np.full((64, 32), 127, np.int8), "right")
    left = helper.make_tensor_value_info("left", TensorProto.UINT8, [8, 64])
    product = helper.make_tensor_value_info("product", TensorProto.INT32, [8, 32])
    node = helper.make_node("MatMulInteger", ["left", "right"], ["product"])
    return serialise(helper.make_graph([node], "int8_probe", [left], [product], [weight]))


if __name__ == "__main__":
    sys.exit(main())
