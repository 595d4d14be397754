"""docs/celery-tests.md names tests that are there."""

from __future__ import annotations

import re

from tests.support.stack import REPOSITORY

PAGE = REPOSITORY / "docs" / "celery-tests.md"
HERE = REPOSITORY / "tests" / "direct"


def test_the_page_names_tests_that_are_there() -> None:
    named, file = [], ""
    for line in PAGE.read_text("utf-8").splitlines():
        ours = line.split(" | ")[-1] if line.startswith("| ") else ""
        for name in re.findall(r"`(test_\w+(?:\.py)?)`", ours):
            if name.endswith(".py"):
                file = name
            else:
                assert f"def {name}(" in (HERE / file).read_text("utf-8"), (file, name)
                named.append(name)
    assert len(named) > 80
