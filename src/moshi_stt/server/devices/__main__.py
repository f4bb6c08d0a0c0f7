"""A model process: `python -m moshi_stt.server.devices DESCRIPTOR [CORE,CORE…]`.

The cores are chosen before anything is imported that starts threads.
"""

import os
import sys


def main() -> int:
    """The exit status."""
    descriptor, *cores = sys.argv[1:]
    if cores:
        os.sched_setaffinity(0, {int(core) for core in cores[0].split(",")})
    from moshi_stt.server.devices.process import DeviceProcess
    from moshi_stt.server.workers import child

    return child.main(int(descriptor), DeviceProcess)


if __name__ == "__main__":
    sys.exit(main())
