"""Serves the page, or a directory of the user's, as moshi-server does (contract section 1.6)."""

import asyncio
from pathlib import Path
from urllib.parse import quote, unquote

from aiohttp import hdrs, web

PACKAGED = Path(__file__).resolve().parent / "static"
"""The page that comes with the package."""

PAGE_HEADERS = {
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self' data:",
            "connect-src 'self'",
            "media-src blob:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'self'",
        )
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""Sent with the packaged page only: a directory of the user's own may need more. The page has no inline script or style."""


class StaticFiles:
    """GET and HEAD of files below a directory, which need not exist."""

    def __init__(self, directory: str | None) -> None:
        """directory: relative to the working directory; None for the packaged page."""
        self._root = (PACKAGED if directory is None else Path(directory)).resolve()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """The file, ranges and conditions as asked; 307 to the slash for a directory; empty 404 and 405."""
        if request.method not in (hdrs.METH_GET, hdrs.METH_HEAD):
            return web.Response(status=405, headers={hdrs.ALLOW: "GET,HEAD"})
        target = request.raw_path.partition("?")[0].partition("#")[0]
        kind, path = await asyncio.to_thread(self._find, target)
        if kind == "redirect":
            location = quote(unquote(target), safe="/") + "/"
            return web.Response(status=307, headers={hdrs.LOCATION: "/" + location.lstrip("/")})
        if kind == "file":
            return web.FileResponse(path, headers=PAGE_HEADERS if self._root == PACKAGED else None)
        return web.Response(status=404)

    def _find(self, target: str) -> tuple[str, Path]:
        """What a request's path names: ("file", it), ("redirect", a directory) or ("missing", the root)."""
        missing = ("missing", self._root)
        names = [name for name in unquote(target).split("/") if name]
        if any(name in (".", "..") or "\0" in name or "\\" in name for name in names):
            return missing
        try:
            path = self._root.joinpath(*names).resolve()
            if not path.is_relative_to(self._root):
                return missing
            if path.is_dir():
                if not target.endswith("/"):
                    return "redirect", path
                path = path / "index.html"
            return ("file", path) if path.is_file() else missing
        except (OSError, ValueError):
            return missing
