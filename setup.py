"""Packaging of the two libraries; the scripts in qat/ are run from the checkout."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

setup(
    name="bevfusion-ptq",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "bevfusion/__init__.py").read_text())[1],
    description="Post-training INT8 quantisation of BEVFusion",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["bevfusion", "bevfusion.*", "lean", "lean.*"]),
    package_data={"lean.report": ["*.html", "*.css", "*.js"]},
    # No install_requires: several of the packages needed declare dependencies that this stack can't have.
    # requirements/ lists them, and requirements/install.sh installs them in the order that works.
)
