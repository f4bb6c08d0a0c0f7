"""The split residual quantiser: a latent to its codes. Knows nothing of streams.

The nearest codebook vector minimises |e|²/2 - x·e; the norms are computed once, at load. Ties go to the lowest index.
"""

import torch
from torch import Tensor

from moshi_stt.models.spec import MimiSpec
from moshi_stt.models.torch_impl.linear import make_linear
from moshi_stt.models.weights import codebook_stems


class SplitQuantizer:
    """Code 0 from the semantic codebook, codes 1 .. K - 1 from a residual chain; both start from the same latent.

    project    (..., dim) -> (..., 2 * codebook_dim)   the two input projections, semantic first
    codebooks  (K, size, codebook_dim)
    distances  for each codebook (B, codebook_dim) -> (B, size): |e|²/2 - x·e of every vector e
    """

    def __init__(self, spec: MimiSpec, params: dict[str, Tensor]) -> None:
        """params: the `quantizer.*` tensors by canonical name, float32."""
        self.dim = spec.codebook_dim
        first, rest = (params[f"quantizer.{part}.input_proj.weight"] for part in ("rvq_first", "rvq_rest"))
        self.project = make_linear(torch.cat([first, rest]).squeeze(-1))
        self.codebooks = torch.stack(
            [
                params[f"{stem}.embedding_sum"] / params[f"{stem}.cluster_usage"].clamp(min=1e-5)[:, None]
                for stem in codebook_stems(spec)
            ]
        )
        self.distances = [make_linear(-codebook, codebook.square().sum(-1) / 2) for codebook in self.codebooks]

    def encode(self, latent: Tensor) -> Tensor:
        """Codes int64 (B, K) of latents (B, dim)."""
        semantic, residual = torch.split(self.project(latent), self.dim, dim=-1)
        codes = [self.distances[0](semantic).argmin(-1)]
        for codebook, distances in zip(self.codebooks[1:], self.distances[1:], strict=True):
            code = distances(residual).argmin(-1)
            codes.append(code)
            residual = residual - codebook[code]
        return torch.stack(codes, dim=-1)
