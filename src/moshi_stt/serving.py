"""A server inside a program: a configuration, its engines and the HTTP side, put together."""

from types import TracebackType
from typing import Self

from moshi_stt.config import ServerConfig
from moshi_stt.config_load import embedded_config, load_config
from moshi_stt.constants import DEFAULT_PORT
from moshi_stt.engines import build_engines
from moshi_stt.server import app


class Server(app.Server):
    """A speech-to-text server inside a program:

        async with Server("stt-1b-en_fr", port=0) as server:
            print(server.port)

    It serves while the block runs. Entering waits until the models are loaded; health can be asked before.
    """

    def __init__(
        self,
        config: ServerConfig | str | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = DEFAULT_PORT,
        force_cpu: bool = False,
    ) -> None:
        """config: a loaded one, a path or the name of a shipped one; None serves the embedded English model.

        host: an IP address. port: 0 takes a free one. force_cpu: run the models on the CPU, whatever else is there.
        Raises ConfigError.
        """
        if config is None:
            config = embedded_config()
        elif isinstance(config, str):
            config = load_config(config).config
        super().__init__(config, build_engines(config, force_cpu=force_cpu), host, port)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()
