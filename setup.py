"""The one thing that pyproject.toml cannot say well: a C extension that may fail to build.

Without it the compiled Python kernels serve, slower, and the server says so at its start.
"""

from pathlib import Path

from setuptools import Extension, setup

SOURCES = sorted(Path("kernels/streamserve_kernels/native/src").glob("*.c"))

setup(
    ext_modules=[
        Extension(
            "streamserve_kernels.native._native",
            sources=[str(source) for source in SOURCES],
            depends=[str(header) for header in SOURCES[0].parent.glob("*.h")],
            # Loaded only where the CPU has all of these.
            extra_compile_args=[
                *("-std=gnu11", "-O3", "-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni"),
                *("-fno-math-errno", "-Wall", "-Wextra", "-Werror=implicit-function-declaration"),
            ],
            optional=True,
        )
    ]
)
