"""From projected latents to Mimi's split residual codes: k-means codebooks, then the language model's tables fitted to them."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from training.model import SmallModel


@dataclass
class Codes:
    """books (K, size, codebook_dim): the semantic one, then the residual chain; both start from the same projection.
    tables (K, size, dim): what the language model adds for each code.
    """

    project: Tensor
    books: Tensor
    tables: Tensor

    def encode(self, latents: Tensor) -> Tensor:
        """(B, T, width) -> codes (B, T, K), nearest by Euclid, as the server chooses them."""
        projected = F.linear(latents, self.project).float()
        found = [_nearest(projected, self.books[0])]
        residual = projected
        for book in self.books[1:]:
            code = _nearest(residual, book)
            found.append(code)
            residual = residual - book[code]
        return torch.stack(found, -1)

    def embed(self, codes: Tensor) -> Tensor:
        """codes (B, T, K) -> (B, T, dim)."""
        return sum(F.embedding(codes[..., k], self.tables[k]) for k in range(len(self.tables)))  # type: ignore[return-value]

    def inputs(self, latents: Tensor) -> Tensor:
        return self.embed(self.encode(latents))


def fit_codes(model: SmallModel, latents: Tensor, generator: torch.Generator, rounds: int = 12) -> Codes:
    """Codebooks by k-means on latents (N, width); each table is its codebook through the model's input projection.

    The semantic codebook comes on top: its table starts at zero.
    """
    shape = model.shape
    project = model["quantizer.rvq_rest.input_proj.weight"][:, :, 0].detach()
    data = F.linear(latents, project).float()
    books = [k_means(data, shape.codebook_size, rounds, generator)]
    residual = data
    for _ in range(shape.codebooks - 1):
        book = k_means(residual, shape.codebook_size, rounds, generator)
        books.append(book)
        residual = residual - book[_nearest(residual, book)]
    tables = [torch.zeros(shape.codebook_size, shape.dim, device=data.device)]
    tables += [F.linear(book, model["latent_in"].detach().float()) for book in books[1:]]
    return Codes(project, torch.stack(books), torch.stack(tables))


def k_means(data: Tensor, count: int, rounds: int, generator: torch.Generator) -> Tensor:
    """Centres (count, D) of data (N, D). A centre that nothing is near to is put on a random point."""

    def points(n: int) -> Tensor:
        return data[torch.randint(0, len(data), (n,), generator=generator, device=data.device)]

    centres = points(count)
    for _ in range(rounds):
        nearest = _nearest(data, centres)
        sums = torch.zeros_like(centres).index_add_(0, nearest, data)
        counts = torch.bincount(nearest, minlength=count)[:, None]
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), points(count))
    return centres


def _nearest(x: Tensor, book: Tensor) -> Tensor:
    """Index of the nearest vector of a codebook: the least of |e|²/2 - x·e."""
    return (book.square().sum(-1) / 2 - x @ book.T).argmin(-1)
