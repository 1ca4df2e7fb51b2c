"""The tutorial does what it says: every command of it, in order, in a fresh folder."""

import re
from pathlib import Path

import pytest

from tests import tutorial

PAGE = tutorial.PAGE.read_text()


def test_every_block_is_run_or_printed() -> None:
    """Nothing on the page looks like a command and is passed over."""
    fences = re.findall(r"^```(\w*)$", PAGE, re.M)
    assert fences.count("sh") == len(tutorial.commands(PAGE)) >= 9
    assert set(fences) == {"sh", "text", ""}
    prose = re.sub(r"^```\w*\n.*?^```$", "", PAGE, flags=re.M | re.S)
    assert not re.search(r"^ {4}\S", prose, re.M)


@pytest.mark.sweep
def test_from_a_table_to_a_merged_model_that_answers(tmp_path: Path, sample_model: Path) -> None:
    tutorial.checkout(tmp_path)
    printed = tutorial.run(tutorial.commands(PAGE), tmp_path)
    assert "opens at seven in the morning" in printed[-4]
    assert "dogs are welcome" in printed[-2]
    assert "shop   done" in printed[-1]
