"""How long a step of Kyutai's 1B would take on this CPU, measured without its weights and without PyTorch.

Nearly all of a step is products with the weights, which onnxruntime does for 8- and 4-bit weights. Two layers' products of the
1B's shape, with random weights, are timed and scaled to a step.
"""

import time

import numpy as np

from moshi_stt.cores import usable_cores
from moshi_stt.models.torch_impl.onnx_node import product_session
from moshi_stt.models.weights import Packing

GROUP = 32
LAYERS, TIMED_LAYERS = 16, 2
SHAPES = ((6_144, 2_048), (2_048, 2_048), (11_264, 2_048), (2_048, 5_632))
"""(out, in) of a layer's products: attention in and out, gate in and out."""

OVERHEAD = {"int8": 2.2, "int4": 3.0}
"""A whole step with a full context over its layers' products, as measured on two quiet cores: attention, Mimi, heads."""

TRIES = 15
BITS = {"int8": 8, "int4": 4}


def step_seconds(quantize: str) -> float:
    """Seconds that a step of one stream of the 1B would take with `int8` or `int4` weights, after a minute of speech."""
    packing, random = Packing(BITS[quantize], GROUP), np.random.default_rng(0)
    work = []
    for rows, columns in SHAPES * TIMED_LAYERS:
        groups = columns // GROUP
        levels = random.integers(0, 256, (rows, groups, GROUP * packing.bits // 8), np.uint8)
        scales = random.random((rows, groups), np.float32) * 1e-3
        zeros = np.full((rows, (groups * packing.bits + 7) // 8), 0x88, np.uint8)
        session = product_session(levels, scales, zeros, packing, usable_cores())
        work.append((session, {"x": random.random((1, columns), np.float32)}))
    taken = []
    for _ in range(TRIES):
        begun = time.perf_counter()
        for session, feed in work:
            session.run(None, feed)
        taken.append(time.perf_counter() - begun)
    return min(taken) * LAYERS / TIMED_LAYERS * OVERHEAD[quantize]
