"""Every Triton kernel against its plain twin."""

from typing import Any

import pytest
from tests.support.triton_twins import DEVICE, INTERPRETED, QUIET, difference, kernels_run, poisoned, torch  # noqa: F401

import torch.nn.functional as F  # isort: skip

from moshi_stt.models.torch_impl.attention import FP8, Ring, make_ring, rotate_and_attend
from moshi_stt.models.torch_impl.attention import ring_attention as plain_attention
from moshi_stt.models.torch_impl.cuda import conv, elementwise, quantiser
from moshi_stt.models.torch_impl.cuda.attention import Tiling, choose_tiling, ring_attention
from moshi_stt.models.torch_impl.cuda.limits import Limits
from moshi_stt.models.torch_impl.cuda.product import gated_product, product, sliced_product, slices
from moshi_stt.models.torch_impl.cuda.quantiser import Tile, make_books, quantise
from moshi_stt.models.torch_impl.rope import RotaryTable

pytestmark = [*QUIET, pytest.mark.usefixtures("kernels_run")]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


# ---- attention -----------------------------------------------------------------------------------------------------------


def unwritten_ring(slots: int, heads: int, context: int, dim: int, dtype: torch.dtype) -> Ring:
    ring = make_ring(slots, heads, context, dim, dtype, DEVICE)
    for tensor in ring:
        if tensor is not None:
            tensor.view(torch.uint8).fill_(0xFF)
    return ring


def _entry(ring: Ring, slot: int, index: int) -> torch.Tensor:
    """The keys at one place, as a reader sees them."""
    keys = ring.k[slot, :, index].float()
    return keys if ring.k_scale is None else keys * ring.k_scale[slot, :, index, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, FP8])
def test_the_order_of_attention_does_not_depend_on_the_rows(dtype: torch.dtype) -> None:
    """Block and warps decide it; how the ring is split, and how many blocks are in flight, do not."""
    for heads, context, dim in ((8, 250, 64), (16, 750, 128), (32, 375, 64)):
        for limits in (Limits((9, 0), 232_448), Limits((8, 9), 101_376)):
            tilings = [choose_tiling(rows, heads, context, dim, dtype, limits) for rows in (1, 2, 7, 64, 300, 1_024, 4_096)]
            assert len({(tiling.block, tiling.warps) for tiling in tilings}) == 1
            assert tilings[0].splits > tilings[-1].splits == 1


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize(("positions", "context"), [(1, 7), (2, 8), (2, 7)])
@pytest.mark.parametrize(
    "ring_dtype", [torch.float32, torch.float16, torch.bfloat16, FP8], ids=["float32", "float16", "bfloat16", "fp8"]
)
def test_attention(ring_dtype: torch.dtype, positions: int, context: int, splits: int) -> None:
    """Streams of different ages, one that begins again, past the ring's end; what was never written is not a number."""
    dtype = torch.bfloat16 if ring_dtype is FP8 else ring_dtype
    tolerance = {torch.float32: 1e-5, torch.float16: 0.002}.get(
        ring_dtype, (0.2 if ring_dtype is FP8 else 0.02) if INTERPRETED else 0.01
    )
    heads, dim, rows = 1, 32, 3
    slots = torch.tensor([3, 0, 2], device=DEVICE)
    ours, plain = (unwritten_ring(5, heads, context, dim, ring_dtype) for _ in range(2))
    start = torch.tensor([0, 2 * context * positions, 0], device=DEVICE)
    start[1] = 0
    for step in range(9):
        if step == 5:
            start[2] = -positions * step  # position 0 again: the old entries must not be seen
        at = start + positions * step
        qkv = randn(rows, positions, 3, heads, dim, dtype=dtype)
        angle = torch.rand(rows, positions, dim // 2, device=DEVICE) * 6
        cos, sin = angle.cos(), angle.sin()
        tiling = Tiling(splits, 4 if INTERPRETED else 16, 4, 1)
        got = ring_attention(qkv, cos, sin, ours, slots, at, tiling=tiling)
        wanted = rotate_and_attend(qkv, (cos, sin), plain, at, slots, plain_attention).view(got.shape)
        assert difference(got, wanted) < tolerance, f"step {step}"
        last = (int(at[0]) + positions - 1) % context
        stored = [_entry(ring, 3, last) for ring in (ours, plain)]
        assert difference(*stored) < tolerance


def test_attention_takes_only_what_it_can() -> None:
    ring = make_ring(1, 1, 4, 32, torch.float32, DEVICE)
    with pytest.raises(ValueError, match="1 or 2"):
        ring_attention(randn(1, 3, 3, 1, 32), randn(1, 3, 16), randn(1, 3, 16), ring, torch.zeros(1), torch.zeros(1))


# ---- products ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(("channels_in", "channels_out", "kernel", "stride", "steps"), [(32, 64, 8, 4, 12), (64, 32, 3, 1, 2)])
def test_conv(rows: int, channels_in: int, channels_out: int, kernel: int, stride: int, steps: int) -> None:
    x = randn(rows, kernel - stride + steps * stride, channels_in)
    weight, bias = randn(channels_out, channels_in, kernel), randn(channels_out)
    out = poisoned(rows, 2 + steps, channels_out)
    conv.conv(x, conv.conv_weight(weight), bias, out, stride=stride, kept=2, activation="elu", precision="ieee")
    wanted = F.elu(F.conv1d(x.transpose(1, 2), weight, bias, stride=stride)).transpose(1, 2)
    assert difference(out[:, 2:], wanted) < 1e-5
    assert out[:, :2].isnan().all(), "the kept columns are not this kernel's"


def test_float16_is_summed_in_float32_and_saturates() -> None:
    """A sum beyond float16's range ends at its largest number, on either side; the rest is rounded once."""
    x, weight = randn(3, 4, 64, dtype=torch.float16), randn(32, 64, dtype=torch.float16)
    bias = torch.zeros(32, device=DEVICE)
    bias[3], bias[5] = 1e6, -1e6
    out = poisoned(3, 4, 32, dtype=torch.float16)
    conv.conv(x, weight, bias, out, precision="tf32")
    wanted = (x.double() @ weight.double().T + bias).clamp(-65_504, 65_504)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-3, atol=1e-3)
    first, second = randn(32, 3 * 64, dtype=torch.float16) / 8, randn(64, 32, dtype=torch.float16)
    many = torch.full((64,), 1e6, device=DEVICE)
    out = poisoned(3, 2, 64, dtype=torch.float16)
    conv.residual(x, first, torch.zeros(32, device=DEVICE), second, many, out, kept=0, precision="tf32")
    assert (out == 65_504).all()


def test_attention_of_float16_saturates() -> None:
    """What a rotation takes out of float16's range is stored as its largest number, so that no later frame is lost to it."""
    ring = unwritten_ring(1, 1, 8, 32, torch.float16)
    turn = torch.full((1, 1, 16), 0.5**0.5, device=DEVICE)
    slots, at = torch.zeros(1, dtype=torch.int64, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    qkv = torch.full((1, 1, 3, 1, 32), 65_504.0, dtype=torch.float16, device=DEVICE)
    got = ring_attention(qkv, turn, turn, ring, slots, at, tiling=Tiling(1, 4 if INTERPRETED else 16, 4, 1))
    assert ring.k[0, 0, 0].abs().max() == 65_504
    assert (got == 65_504).all()


@pytest.mark.parametrize("channels", [32, 256])
def test_residual(channels: int) -> None:
    """Narrow blocks in one kernel, wide ones in two."""
    rows, steps, hidden = 2, 20, channels // 2
    x = randn(rows, 2 + steps, channels)
    first, second = randn(hidden, channels, 3) / channels**0.5, randn(channels, hidden, 1) / channels**0.5
    bias1, bias2 = randn(hidden), randn(channels)
    out = poisoned(rows, 4 + steps, channels)
    weights = conv.conv_weight(first), bias1, conv.conv_weight(second), bias2
    conv.residual(x, *weights, out, kept=4, precision="ieee")
    raw = x.transpose(1, 2)
    wanted = F.elu(raw[..., 2:] + F.conv1d(F.elu(F.conv1d(F.elu(raw), first, bias1)), second, bias2)).transpose(1, 2)
    assert difference(out[:, 4:], wanted) < 1e-5


def test_first_conv_and_the_cleaning_of_sound() -> None:
    pcm = randn(2, 96)
    pcm[0, 5], pcm[0, 6], pcm[1, 7], pcm[1, 8] = float("nan"), float("inf"), 1e9, -1e9
    placed = poisoned(2, 6 + 96, 1)
    conv.place_sound(pcm, placed)
    wanted = torch.nan_to_num(pcm, 0.0, 0.0, 0.0).clamp(-100, 100)
    torch.testing.assert_close(placed[:, 6:, 0], wanted)
    placed[:, :6] = 0.5
    weight, bias = randn(32, 1, 7), randn(32)
    out = poisoned(2, 2 + 96, 32)
    conv.first_conv(placed, conv.conv_weight(weight), bias, out, 2)
    assert difference(out[:, 2:], F.conv1d(placed.transpose(1, 2), weight, bias).transpose(1, 2)) < 1e-5


@pytest.mark.parametrize("rows", [1, 37])
def test_product(rows: int) -> None:
    x, weight = randn(rows, 96), randn(40, 96)
    assert difference(product(x, weight), x @ weight.T) < 1e-5


@pytest.mark.parametrize("rows", [5, 64])
def test_gated_product(rows: int) -> None:
    dtype = torch.float32 if INTERPRETED else torch.bfloat16  # the interpreter multiplies bf16 as if it were integers
    x, weight = randn(rows, 256, dtype=dtype), randn(2 * 70, 256, dtype=dtype)
    gate, value = (x.float() @ weight.float().T).chunk(2, -1)
    assert difference(gated_product(x, weight), F.silu(gate) * value) < (1e-5 if INTERPRETED else 0.01)


def test_a_sliced_product_is_summed_by_its_reader() -> None:
    """Parts of a quarter of the columns each; the norm that reads them adds them up, rounded once."""
    columns = 4_096
    x, weight, alpha = randn(3, columns), randn(48, columns), torch.rand(48, device=DEVICE)
    assert slices(48, columns) == 4
    parts = sliced_product(x, weight)
    for i, part in enumerate(parts):
        columns_of = slice(1_024 * i, 1_024 * (i + 1))
        assert difference(part, x[:, columns_of] @ weight[:, columns_of].T) < 1e-5
    carried = [randn(3, 48)] * 2
    carried = [tensor.clone() for tensor in carried]
    deltas = (parts[0] + parts[1] + parts[2] + parts[3], parts)
    normed = [elementwise.add_rms(x, delta, alpha, 1e-8) for x, delta in zip(carried, deltas, strict=True)]
    assert torch.equal(*normed)
    assert torch.equal(*carried)


def test_tails_of_many_rows_go_to_their_slots() -> None:
    """From 256 rows on a program copies several, of which the last has fewer."""
    tails = conv.TailMap([(3, 5, 8)], [0], 24, DEVICE)
    state = randn(300, 24)
    before, slots = state.clone(), torch.randperm(300)[:259].to(DEVICE)
    frames = torch.arange(259, device=DEVICE) % 3
    whole, (buffer,) = tails.make(259, torch.float16)
    whole.fill_(2.0)
    tails.load(whole, state, slots, frames)
    wanted = torch.where((frames > 0)[:, None], before[slots], 0.0)
    torch.testing.assert_close(buffer[:, :3].flatten(1), wanted.half())
    buffer[:, 5:] = torch.arange(259, device=DEVICE)[:, None, None].half()
    tails.save(whole, state, slots)
    torch.testing.assert_close(state[slots], torch.arange(259.0, device=DEVICE)[:, None].expand(259, 24))
    others = torch.ones(300, dtype=torch.bool, device=DEVICE).index_fill_(0, slots, False)
    torch.testing.assert_close(state[others], before[others])


def test_tails_go_to_their_slot_and_back() -> None:
    shapes = [(6, 20, 1), (2, 20, 4), (3, 5, 8)]
    columns = [0, 6, 14]
    tails = conv.TailMap(shapes, columns, 40, DEVICE)
    state = randn(5, 40)
    before = state.clone()
    slots, frames = torch.tensor([3, 1], device=DEVICE), torch.tensor([7, 0], device=DEVICE)
    whole, buffers = tails.make(2, torch.float32)
    whole.normal_()
    tails.load(whole, state, slots, frames)
    for buffer, (context, _, channels), first in zip(buffers, shapes, columns, strict=True):
        kept = before[3, first : first + context * channels].view(context, channels)
        torch.testing.assert_close(buffer[0, :context], kept)
        assert not buffer[1, :context].any(), "a fresh stream begins from zeros"
    tails.save(whole, state, slots)
    for row, slot in enumerate((3, 1)):
        last = torch.cat([buffer[row, steps:].flatten() for buffer, (_, steps, _) in zip(buffers, shapes, strict=True)])
        torch.testing.assert_close(state[slot, : len(last)], last)
    torch.testing.assert_close(state[[0, 2, 4]], before[[0, 2, 4]])


# ---- quantiser and small kernels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
@pytest.mark.parametrize("rows", [3, 70])
def test_quantiser(rows: int, precision: str) -> None:
    books = randn(4, 128, 64)
    half_norms = books.square().sum(-1) / 2
    latent = randn(rows, 128) * 4
    codes = torch.full((100, 4), -1, device=DEVICE)
    slots = torch.randperm(100)[:rows].to(DEVICE)
    quantise(latent, make_books(books), codes, slots, precision=precision)
    wanted = [(half_norms[0] - latent[:, :64] @ books[0].T).argmin(1)]
    residual = latent[:, 64:]
    for book, norms in zip(books[1:], half_norms[1:], strict=True):
        wanted.append((norms - residual @ book.T).argmin(1))
        residual = residual - book[wanted[-1]]
    torch.testing.assert_close(codes[slots], torch.stack(wanted, 1))
    assert (codes.sum(1) == -4).sum() == 100 - rows, "other slots stay as they are"


def test_books_split_ahead_give_the_bits_of_books_split_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Distances and choices of every level; the two parts of a book are the book, and the first has 10 bits of fraction."""
    books = make_books(randn(4, 128, 64))
    assert torch.equal(books.big + books.small, books.vectors)
    assert not (books.big.view(torch.int32) & 0x1FFF).any()
    found: list[torch.Tensor] = []
    launch = quantiser.launch

    def noted(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        launch(kernel, grid, *arguments, **options)
        if kernel is quantiser._keep_codes:
            found.append(arguments[0].clone())

    monkeypatch.setattr(quantiser, "launch", noted)
    latent, slots = randn(40, 128) * 4, torch.arange(40, device=DEVICE)
    codes = torch.zeros(40, 4, dtype=torch.int64, device=DEVICE)
    for split in (False, True):
        tile = Tile(16, 32, 32, 4, 2, split)
        quantise(latent, books, codes, slots, precision="tf32x3", tile=tile)
    assert torch.equal(*found)
    assert len(found[0]) == 4


def test_quantiser_takes_the_lowest_index_of_equals() -> None:
    books = randn(2, 128, 64)
    books[:, 100] = books[:, 3]
    latent = torch.cat([books[0, 3], books[1, 3]])[None]
    codes = torch.zeros(1, 2, dtype=torch.int64, device=DEVICE)
    slots = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    quantise(latent, make_books(books), codes, slots, precision="ieee")
    assert codes.tolist() == [[3, 3]]


def test_frames_advance_and_angles_stay_exact() -> None:
    frames = torch.tensor([7, 8, 9, 5_000_000], device=DEVICE)
    rows = elementwise.advance(
        torch.tensor([2, 0, 3], device=DEVICE), torch.tensor([0, 1, 0], dtype=torch.uint8, device=DEVICE), frames
    )
    assert rows.tolist() == [9, 0, 5_000_000]
    assert frames.tolist() == [1, 8, 10, 5_000_001]
    cos, sin = elementwise.angles(rows, elementwise.angle_rates(32, 1e4, DEVICE), 2)
    plain_cos, plain_sin = RotaryTable(64, 1e4, DEVICE)(rows[:, None] * 2 + torch.arange(2, device=DEVICE))
    torch.testing.assert_close(cos, plain_cos, atol=3e-7, rtol=0)
    torch.testing.assert_close(sin, plain_sin, atol=3e-7, rtol=0)


@pytest.mark.parametrize("conditioned", [False, True])
def test_embedding(conditioned: bool) -> None:
    start, pad, books, dim = 40, 15, 3, 96
    table = randn(start + 1 + books * (pad + 1), dim)
    texts = torch.randint(0, start, (4,), device=DEVICE)
    codes = torch.randint(0, pad, (4, books), device=DEVICE)
    condition = randn(dim) if conditioned else None
    slots, frames = torch.tensor([2, 0], device=DEVICE), torch.tensor([5, 0], device=DEVICE)
    got = elementwise.embed(slots, frames, texts, codes, table, condition, start_token=start, pad_code=pad)
    first = start + 1 + torch.arange(books, device=DEVICE) * (pad + 1)
    extra = condition if condition is not None else 0
    torch.testing.assert_close(got[0], table[texts[2]] + table[first + codes[2]].sum(0) + extra)
    torch.testing.assert_close(got[1], table[start] + table[first + pad].sum(0) + extra)


def test_norms() -> None:
    x, delta, alpha = randn(3, 96), randn(3, 96), randn(96)
    total = x + delta
    got = elementwise.add_rms(x, delta, alpha, 1e-8)
    torch.testing.assert_close(x, total)
    torch.testing.assert_close(got, F.rms_norm(total, (96,), alpha, 1e-8))
    x, delta, scale, weight, bias = randn(6, 64), randn(6, 64), randn(64), randn(64), randn(64)
    total = x + scale * delta
    kept_x = x.clone()
    got = elementwise.scaled_add_norm(x, delta, scale, weight, bias, 1e-5)
    torch.testing.assert_close(x, total)
    torch.testing.assert_close(got, F.layer_norm(total, (64,), weight, bias, 1e-5))
    for replicate in (True, False):
        out = torch.zeros(3, 4, 64, device=DEVICE)
        frames = torch.tensor([4, 0, 9], device=DEVICE)
        elementwise.scaled_add_into(kept_x, delta, scale, out, frames, 2, replicate=replicate)
        torch.testing.assert_close(out[:, 2:].reshape(6, 64), total)
        wanted = total[2].expand(2, 64) if replicate else torch.zeros(2, 64, device=DEVICE)
        torch.testing.assert_close(out[1, :2], wanted)
        assert not out[[0, 2], :2].any()


def test_choice_of_the_token() -> None:
    """The lowest of equals, across blocks; its log-probability; the heads' first probabilities."""
    vocabulary, heads, dim = 5_000, 3, 6
    logits = randn(2, vocabulary + heads * dim)
    logits[0, 1] = logits[0, 4_000] = 9.0
    logits[1, vocabulary - 1] = 12.0
    out, texts = poisoned(2, 2 + heads), torch.zeros(4, dtype=torch.int64, device=DEVICE)
    elementwise.choose(logits, torch.tensor([2, 0], device=DEVICE), texts, out, vocabulary, heads, dim)
    assert out[:, 0].tolist() == [1, vocabulary - 1]
    assert texts.tolist() == [vocabulary - 1, 0, 1, 0]
    torch.testing.assert_close(out[:, 1], logits[:, :vocabulary].log_softmax(-1).max(-1).values)
    torch.testing.assert_close(out[:, 2:], logits[:, vocabulary:].view(2, heads, dim).softmax(-1)[..., 0])
