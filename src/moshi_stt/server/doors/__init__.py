"""The protocols that the server speaks, one file each. A further one is a file here and a line in `DOORS`."""

from typing import Final

from moshi_stt.server.doors.door import AnyDoor
from moshi_stt.server.doors.kyutai import KyutaiDoor, KyutaiFiles

DOORS: Final[tuple[AnyDoor, ...]] = (
    KyutaiDoor(),
    KyutaiFiles(),
)
