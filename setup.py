"""The one thing that pyproject.toml cannot say well: C extensions that may fail to build.

Without them the compiled Python kernels serve, slower, and the server says so at its start.
"""

from copy import copy
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = sorted(Path("kernels/streamserve_kernels/native/src").glob("*.c"))
# What each build may use; `native/library.py` loads the best one that the CPU runs.
BUILDS = {
    "v4_bf16": ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"),
    "v4": ("-march=x86-64-v4", "-mavx512vnni"),
    "v3": ("-march=x86-64-v3",),
}


class BuildEach(build_ext):
    """Builds the same sources several times at once: each into objects of its own."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or len(BUILDS)

    def build_extension(self, ext: Extension) -> None:
        one = copy(self)
        one.build_temp = str(Path(self.build_temp) / ext.name)
        super(BuildEach, one).build_extension(ext)


setup(
    cmdclass={"build_ext": BuildEach},
    ext_modules=[
        Extension(
            f"streamserve_kernels.native._native_{build}",
            sources=[str(source) for source in SOURCES],
            depends=[str(header) for header in SOURCES[0].parent.glob("*.h")],
            extra_compile_args=[
                *("-std=gnu11", "-O3", *flags, "-fno-math-errno", "-g0"),
                *("-Wall", "-Wextra", "-Werror=implicit-function-declaration"),
            ],
            optional=True,
        )
        for build, flags in BUILDS.items()
    ],
)
