"""Wyoming, Home Assistant's protocol, as a door on a TCP port of its own (the session is in `wyoming_session.py`)."""

from collections.abc import Mapping, Sequence

from moshi_stt.config import ServerConfig, WyomingConfig
from moshi_stt.engine.engine import EngineInfo, StreamOptions
from moshi_stt.server.doors.door import Opening, SocketDoor
from moshi_stt.server.doors.options import prefix_seconds
from moshi_stt.server.doors.prefix import with_prefix
from moshi_stt.server.doors.wyoming_framing import WyomingFraming
from moshi_stt.server.doors.wyoming_session import WyomingOptions, WyomingSession
from moshi_stt.server.framing import Framing
from moshi_stt.session import Session
from moshi_stt.text.word_lists import WordLists


class WyomingDoor(SocketDoor):
    """Served where the configuration has a `[wyoming]` table. Knows no keys."""

    name = "wyoming"

    def addresses(self, config: ServerConfig) -> Sequence[tuple[str, int]]:
        return [] if config.wyoming is None else [config.wyoming.address]

    def accept(self, peer: str, config: ServerConfig, modules: Mapping[str, EngineInfo]) -> Opening:
        wyoming = config.wyoming or WyomingConfig()
        options = WyomingOptions(dict(modules), WordLists(profanity=wyoming.profanity_filter), endpointing=wyoming.endpointing)
        return Opening(options, stream=StreamOptions(turns=wyoming.endpointing), on_demand=True)

    def session(self, opening: Opening) -> Session:
        options: WyomingOptions = opening.options
        return with_prefix(WyomingSession(options), prefix_seconds(options.modules, None))

    def framing(self, max_message_bytes: int) -> Framing:
        return WyomingFraming()
