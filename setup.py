"""The one thing pyproject.toml cannot say: configs/, outside src/ and kernels/, is a package too."""

from __future__ import annotations

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Adds `attnzoo.configs` to the packages that were found under src/ and kernels/."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.packages = [*self.packages, "attnzoo.configs"]


setup(cmdclass={"build_py": BuildWithConfigs})
