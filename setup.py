"""Builds the wheel: two packages, and the one module that tells transformers about grasp checkpoints."""

from setuptools import setup

setup(
    packages=["grasp", "grasp_kernels"],
    package_dir={"grasp_kernels": "kernels/grasp_kernels"},
    py_modules=["grasp_autoload"],
    package_data={"grasp": ["py.typed"], "grasp_kernels": ["py.typed"]},
)
