"""The engine's packages; pyproject.toml holds the metadata. The kernels are a distribution of their own, in kernels/."""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["dataloaders*", "pite*", "engine*"]),
    package_data={
        "pite.web": ["*.js", "*.css"],
        # The tiny CLIP and Vicuna that the demo starts from.
        "engine.tiny": ["parts/**"],
        # The events and first boxes of the demo on real video.
        "engine.demo": ["*.json"],
    },
)
