"""What Triton needs at run time to build kernels. Imports no framework: `moshi-stt doctor` asks it, too."""

import os
import shutil

NO_COMPILER = "Triton needs a C compiler and finds none (install gcc, or set CC)"


def c_compiler() -> str | None:
    """The C compiler that Triton would call: $CC, gcc or clang. None where there is none."""
    if wanted := os.environ.get("CC"):
        return shutil.which(wanted.split()[0])
    return shutil.which("gcc") or shutil.which("clang")
