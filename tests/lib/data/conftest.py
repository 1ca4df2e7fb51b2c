"""What the tests of data artifacts share."""

from pathlib import Path

import pytest

from tests.lib.conftest import Tokenizers
from tests.lib.data.making import Maker


@pytest.fixture
def maker(tmp_path: Path, tokenizers: Tokenizers) -> Maker:
    return Maker(tmp_path, tokenizers("embedded"))
