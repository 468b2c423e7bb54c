"""One wheel with two import packages: `mmcore` from the root, `mmkernels` from kernels/."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["mmcore", "mmcore.*"]),
        *find_packages("kernels", include=["mmkernels", "mmkernels.*"]),
    ],
    package_dir={"mmkernels": "kernels/mmkernels"},
    package_data={"mmcore": ["py.typed"], "mmkernels": ["py.typed"]},
)
