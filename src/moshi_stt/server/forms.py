"""Forms (multipart/form-data) with one file in them, read as they come."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import BodyPartReader, hdrs, web

MOST_FIELDS: Final = 1_000
MOST_FIELD_BYTES: Final = 1 << 20
"""Of all fields together, the file excepted."""

Fields = tuple[tuple[str, str], ...]


class BadForm(Exception):
    """The body is no form, or one that nobody needs to send."""


class FormTimeout(Exception):
    """Nothing came for too long."""


async def read_form(
    request: web.Request, file_part: str, write: Callable[[bytes], Awaitable[None]], patience_seconds: float
) -> tuple[Fields, str | None]:
    """Every field in order, and the file's name; None where there is no file. write: takes the file's bytes, piece by piece.

    A file is the part of that name that has a filename. Raises BadForm, FormTimeout, what `write` and aiohttp's reader raise.
    """
    try:
        reader = await request.multipart()
    except (AssertionError, ValueError, KeyError) as error:
        raise BadForm(f"expected a form (multipart/form-data): {error}") from None
    fields: list[tuple[str, str]] = []
    name: str | None = None
    size = 0
    while True:
        try:
            async with asyncio.timeout(patience_seconds):
                part = await reader.next()
        except TimeoutError:
            raise FormTimeout from None
        except ValueError as error:
            raise BadForm(str(error)) from None
        if part is None:
            return tuple(fields), name
        if not isinstance(part, BodyPartReader) or len(fields) >= MOST_FIELDS:
            raise BadForm("the form has forms within, or too many fields")
        is_file = part.name == file_part and part.filename is not None and name is None
        value = bytearray()
        while piece := await _next_chunk(part, patience_seconds):
            if is_file:
                await write(piece)
                continue
            size += len(piece)
            if size > MOST_FIELD_BYTES:
                raise BadForm(f"the fields of the form have more than {MOST_FIELD_BYTES} bytes")
            value += piece
        if is_file:
            name = part.filename
        elif part.name is not None:
            fields.append((part.name, value.decode("utf-8", "replace")))


async def _next_chunk(part: BodyPartReader, patience_seconds: float) -> bytes:
    """Some of a part, decoded; empty at its end."""
    try:
        async with asyncio.timeout(patience_seconds):
            piece = bytes(await part.read_chunk())
    except TimeoutError:
        raise FormTimeout from None
    except ValueError as error:
        raise BadForm(str(error)) from None
    if piece and hdrs.CONTENT_TRANSFER_ENCODING in part.headers:
        return bytes(part.decode(piece))
    return piece
