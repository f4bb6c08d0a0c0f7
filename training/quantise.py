"""From projected latents to Mimi's split residual codes: k-means codebooks, then the language model's tables fitted to them."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from training.model import Shape, SmallModel


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


class Quantizer:
    """Codebooks while the encoder still learns: each follows the latents that choose it, by moving averages."""

    def __init__(self, books: Tensor, keep: float = 0.99) -> None:
        """books (K, size, codebook_dim)."""
        self.books, self._keep = books.clone(), keep
        self._sums = self.books.clone()
        self._counts = torch.ones(books.shape[:2], device=books.device)

    @torch.no_grad()
    def __call__(self, projected: Tensor) -> Tensor:
        """(B, T, D) -> the sum of its residual codes, (B, T, D); the codebooks move on a step."""
        with torch.autocast(projected.device.type, enabled=False):
            data = projected.float().flatten(0, -2)
            self._follow(0, data, _nearest(data, self.books[0]))
            residual = data
            for level in range(1, len(self.books)):
                code = _nearest(residual, self.books[level])
                rounded = self.books[level][code]
                self._follow(level, residual, code)
                residual = residual - rounded
            return (data - residual).view_as(projected)

    def _follow(self, level: int, data: Tensor, code: Tensor) -> None:
        """A centre that is hardly chosen goes to a vector of the batch."""
        size = self.books.shape[1]
        counts = torch.zeros(size, device=data.device).index_add_(0, code, torch.ones_like(data[:, 0]))
        sums = torch.zeros_like(self.books[level]).index_add_(0, code, data)
        share = size / len(data)  # the centres are chosen once each, in the mean
        self._counts[level].lerp_(counts * share, 1 - self._keep)
        self._sums[level].lerp_(sums * share, 1 - self._keep)
        rare = (self._counts[level] < 0.02)[:, None]
        other = data[torch.randint(len(data), (size,), device=data.device)]
        self.books[level] = torch.where(rare, other, self._sums[level] / self._counts[level].clamp(min=1e-6)[:, None])
        self._sums[level] = torch.where(rare, other, self._sums[level])
        self._counts[level] = torch.where(rare[:, 0], torch.ones_like(self._counts[level]), self._counts[level])


def fit_codes(
    model: SmallModel, latents: Tensor, generator: torch.Generator, rounds: int = 12, books: Tensor | None = None
) -> Codes:
    """Codebooks by k-means on latents (N, width); each table is its codebook through the model's input projection.

    The semantic codebook comes on top: its table starts at zero. books: to begin with, (K, size, codebook_dim).
    """
    project = model["quantizer.rvq_rest.input_proj.weight"][:, :, 0].detach()
    return codes_of(model, fit_books(F.linear(latents, project).float(), model.shape, generator, rounds, books))


def fit_books(data: Tensor, shape: Shape, generator: torch.Generator, rounds: int = 12, books: Tensor | None = None) -> Tensor:
    """The codebooks alone, (K, size, codebook_dim), of projected latents (N, codebook_dim)."""
    known = [None] * shape.codebooks if books is None else list(books.to(data))
    found = [k_means(data, shape.codebook_size, rounds, generator, known[0])]
    residual = data
    for begin in known[1:]:
        book = k_means(residual, shape.codebook_size, rounds, generator, begin)
        found.append(book)
        residual = residual - book[_nearest(residual, book)]
    return torch.stack(found)


def codes_of(model: SmallModel, books: Tensor) -> Codes:
    """What codebooks (K, size, codebook_dim) are to a model whose language model reads latents."""
    tables = [torch.zeros(books.shape[1], model.shape.dim, device=books.device)]
    tables += [F.linear(book, model["latent_in"].detach().float()) for book in books[1:]]
    project = model["quantizer.rvq_rest.input_proj.weight"][:, :, 0].detach()
    return Codes(project, books, torch.stack(tables))


def k_means(data: Tensor, count: int, rounds: int, generator: torch.Generator, begin: Tensor | None = None) -> Tensor:
    """Centres (count, D) of data (N, D), from `begin` on. A centre that nothing is near to is put on a random point."""

    def points(n: int) -> Tensor:
        return data[torch.randint(0, len(data), (n,), generator=generator, device=data.device)]

    centres = points(count) if begin is None else begin
    for _ in range(rounds):
        nearest = _nearest(data, centres)
        sums = torch.zeros_like(centres).index_add_(0, nearest, data)
        counts = torch.bincount(nearest, minlength=count)[:, None]
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), points(count))
    return centres


def _nearest(x: Tensor, book: Tensor) -> Tensor:
    """Index of the nearest vector of a codebook: the least of |e|²/2 - x·e."""
    return (book.square().sum(-1) / 2 - x @ book.T).argmin(-1)
