"""The split residual quantiser: a latent to its codes. Knows nothing of streams.

The nearest codebook vector minimises |e|²/2 - x·e; the norms are computed once, at load. Ties go to the lowest index.
"""

import mlx.core as mx

from moshi_stt.models.mlx_impl.linear import DenseLinear
from moshi_stt.models.spec import MimiSpec
from moshi_stt.models.weights import codebook_stems


class SplitQuantizer:
    """Code 0 from the semantic codebook, codes 1 .. K - 1 from a residual chain; both start from the same latent.

    project    (..., dim) -> (..., 2 * codebook_dim)   the two input projections, semantic first
    codebooks  K x (size, codebook_dim)
    halves     K x (size,)                              |e|²/2 of every vector e
    """

    def __init__(self, spec: MimiSpec, params: dict[str, mx.array]) -> None:
        """params: the `quantizer.*` tensors by canonical name, float32."""
        self.dim = spec.codebook_dim
        first, rest = (params[f"quantizer.{part}.input_proj.weight"] for part in ("rvq_first", "rvq_rest"))
        self.project = DenseLinear(mx.concatenate([first, rest]).squeeze(-1))
        self.codebooks = [
            params[f"{stem}.embedding_sum"] / mx.maximum(params[f"{stem}.cluster_usage"], 1e-5)[:, None]
            for stem in codebook_stems(spec)
        ]
        self.halves = [codebook.square().sum(-1) / 2 for codebook in self.codebooks]

    def encode(self, latent: mx.array) -> mx.array:
        """Codes uint32 (B, K) of latents (B, dim)."""
        semantic, residual = mx.split(self.project(latent), 2, axis=-1)
        codes = [self._nearest(0, semantic)]
        for i in range(1, len(self.codebooks)):
            code = self._nearest(i, residual)
            codes.append(code)
            residual = residual - self.codebooks[i][code]
        return mx.stack(codes, axis=-1)

    def _nearest(self, i: int, x: mx.array) -> mx.array:
        """Index uint32 (B,) of the vector of codebook i that is nearest to x (B, codebook_dim)."""
        return mx.argmin(mx.addmm(self.halves[i], x, self.codebooks[i].T, alpha=-1.0), axis=-1)
