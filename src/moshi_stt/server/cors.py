"""Cross-origin requests of web pages (CORS): answered for the pages that `allowed_origins` lists, and for no others."""

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from moshi_stt.origins import Origins

REQUEST_HEADERS = "authorization, content-type, kyutai-api-key, x-api-key"
MAX_AGE_SECONDS = 600


def cors(origins: Origins) -> Middleware:
    """A middleware that answers preflight requests and adds the headers that browsers ask for."""

    @web.middleware
    async def handle(request: web.Request, handler: Handler) -> web.StreamResponse:
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is None or not origins.is_listed(origin):
            return await handler(request)
        if request.method == hdrs.METH_OPTIONS and hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers:
            response: web.StreamResponse = web.Response(status=204)
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_METHODS] = "GET, POST"
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_HEADERS] = REQUEST_HEADERS
            response.headers[hdrs.ACCESS_CONTROL_MAX_AGE] = str(MAX_AGE_SECONDS)
        else:
            response = await handler(request)
        if not response.prepared:
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = origin
            response.headers[hdrs.VARY] = hdrs.ORIGIN
        return response

    return handle
