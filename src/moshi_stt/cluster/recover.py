"""Starts a Ray of our own again after it has died, and the controller. The front runs it.

python -m moshi_stt.cluster.recover FOLDER
"""

import sys
from pathlib import Path

import msgspec

from moshi_stt.cluster import own_ray
from moshi_stt.cluster.controller import Desired
from moshi_stt.cluster.spec import Paths
from moshi_stt.errors import MoshiSttError


def main() -> int:
    paths = Paths(Path(sys.argv[1]))
    try:
        desired = msgspec.json.decode(paths.cluster.read_bytes(), type=Desired)
        own = own_ray.start(paths)
        own_ray.connect(own.address, own)
        from moshi_stt.cluster.actors import Remote

        Remote.start(desired.spec, paths.folder).fleet()
    except (OSError, msgspec.MsgspecError, MoshiSttError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
