"""The protocols that the server speaks, one file each. A further one is a file here and a line in `DOORS`."""

from typing import Final

from moshi_stt.server.doors.deepgram import DeepgramFiles, DeepgramFlux, DeepgramLive
from moshi_stt.server.doors.door import AnyDoor
from moshi_stt.server.doors.gradium import GradiumFiles, GradiumLive
from moshi_stt.server.doors.kyutai import KyutaiDoor, KyutaiFiles
from moshi_stt.server.doors.openai import OpenAIRealtime
from moshi_stt.server.doors.openai_files import OpenAIFiles, OpenAIModels, OpenAITranslations
from moshi_stt.server.doors.wyoming import WyomingDoor

DOORS: Final[tuple[AnyDoor, ...]] = (
    KyutaiDoor(),
    KyutaiFiles(),
    OpenAIFiles(),
    OpenAITranslations(),
    OpenAIModels(),
    OpenAIRealtime(),
    DeepgramLive(),
    DeepgramFiles(),
    DeepgramFlux(),
    GradiumLive(),
    GradiumFiles(),
    WyomingDoor(),
)
