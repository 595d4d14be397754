"""What the server's distribution takes from the tree: its packages, and what ../pyproject.toml says once for both."""

from __future__ import annotations

import tomllib
from pathlib import Path

from setuptools import find_namespace_packages, setup

PACKAGES = ("api_gateway", "migrations", "tasks", "workers")
TREE = ".."

declared = tomllib.loads(Path(TREE, "pyproject.toml").read_text(encoding="utf-8"))
project, groups = declared["project"], declared["dependency-groups"]

setup(
    version=project["version"],
    python_requires=project["requires-python"],
    keywords=project["keywords"],
    classifiers=[one for one in project["classifiers"] if not one.startswith("Typing")],
    install_requires=[f"{project['name']}=={project['version']}", *groups["server"]],
    extras_require={name: needed for name, needed in groups.items() if name not in ("server", "dev")},
    package_dir={"": TREE},
    packages=find_namespace_packages(
        TREE, include=[*PACKAGES, *(f"{one}.*" for one in PACKAGES)], exclude=["*.__pycache__", "*.__pycache__.*"]
    ),
    package_data={"": ["*.html", "*.css", "*.js", "*.svg", "*.mako"]},
    include_package_data=False,
    options={"egg_info": {"egg_base": "."}},
)
