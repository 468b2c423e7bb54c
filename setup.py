"""One wheel with two import packages: `mmcore` from the root, `mmkernels` from kernels/.

The CPU's native step is built where cmake and a C++ compiler are; `MMKERNELS_NATIVE=0` leaves it out.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).parent.resolve()


class BuildNative(build_ext):
    """Build `mmkernels/_native.so` by CMake, in a fresh folder: it takes seconds."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        into = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        with tempfile.TemporaryDirectory() as folder:
            configure = [
                *("cmake", "-S", ROOT, "-B", folder, *generator, "-DCMAKE_BUILD_TYPE=Release"),
                "-DTORCH_INCLUDE_DIRS=" + ";".join(include_paths()),
                "-DTORCH_LIBRARY_DIRS=" + ";".join(library_paths()),
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={into}",
            ]
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", folder, "--parallel"], check=True)


class NativeWheel(bdist_wheel):
    """A wheel for this platform and any Python: the library holds none of Python's ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return ("py3", "none", tag[2]) if self.distribution.has_ext_modules() else tag


def native_modules() -> list[Extension]:
    if os.environ.get("MMKERNELS_NATIVE") == "0":
        lacks = "MMKERNELS_NATIVE=0"
    elif sys.platform == "win32":
        lacks = "it is written for GCC and Clang"
    elif not shutil.which("cmake"):
        lacks = "there is no cmake"
    elif not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        lacks = "there is no C++ compiler"
    elif not any(map(shutil.which, ("ninja", "make"))):
        lacks = "there is neither ninja nor make"
    else:
        return [Extension("mmkernels._native", sources=[])]
    print(f"mmkernels: the CPU's native step is not built, ATen serves in its place: {lacks}", file=sys.stderr)
    return []


setup(
    packages=[
        *find_packages(include=["mmcore", "mmcore.*"]),
        *find_packages("kernels", include=["mmkernels", "mmkernels.*"]),
    ],
    package_dir={"mmkernels": "kernels/mmkernels"},
    package_data={"mmcore": ["py.typed"], "mmkernels": ["py.typed"]},
    ext_modules=native_modules(),
    cmdclass={"build_ext": BuildNative, "bdist_wheel": NativeWheel},
)
