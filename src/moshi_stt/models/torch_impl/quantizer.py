"""The split residual quantiser: a latent to its codes. Knows nothing of streams.

The nearest codebook vector minimises |e|²/2 - x·e; the norms are computed once, at load. Ties go to the lowest index.
"""

import torch
from torch import Tensor

from moshi_stt.models.spec import MimiSpec
from moshi_stt.models.weights import codebook_stems


class SplitQuantizer:
    """Code 0 from the semantic codebook, codes 1 .. K - 1 from a residual chain; both start from the same latent.

    project    (2 * codebook_dim, dim)   the two input projections, semantic first
    codebooks  (K, size, codebook_dim)
    half_norms (K, size)                 |e|² / 2
    """

    def __init__(self, spec: MimiSpec, params: dict[str, Tensor]) -> None:
        """params: the `quantizer.*` tensors by canonical name, float32."""
        self.dim = spec.codebook_dim
        first, rest = (params[f"quantizer.{part}.input_proj.weight"] for part in ("rvq_first", "rvq_rest"))
        self.project = torch.cat([first, rest]).squeeze(-1).contiguous()
        self.codebooks = torch.stack(
            [
                params[f"{stem}.embedding_sum"] / params[f"{stem}.cluster_usage"].clamp(min=1e-5)[:, None]
                for stem in codebook_stems(spec)
            ]
        )
        self.half_norms = self.codebooks.square().sum(-1) / 2

    def encode(self, latent: Tensor) -> Tensor:
        """Codes int64 (B, K) of latents (B, dim)."""
        semantic, residual = torch.split(latent @ self.project.T, self.dim, dim=-1)
        codes = [nearest(semantic, self.codebooks[0], self.half_norms[0])]
        for codebook, half_norms in zip(self.codebooks[1:], self.half_norms[1:], strict=True):
            code = nearest(residual, codebook, half_norms)
            codes.append(code)
            residual = residual - codebook[code]
        return torch.stack(codes, dim=-1)


def nearest(x: Tensor, codebook: Tensor, half_norms: Tensor) -> Tensor:
    """Index int64 (B,) of the codebook vector nearest to each x (B, D); codebook (N, D), half_norms (N,)."""
    return torch.addmm(half_norms, x, codebook.T, alpha=-1).argmin(-1)
