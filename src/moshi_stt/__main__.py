"""`python -m moshi_stt`: the command line. Knows only where it is."""

import sys

from moshi_stt.cli import main

sys.exit(main())
