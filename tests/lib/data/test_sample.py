"""The embedded data: deterministic, in shape, and varied."""

import hashlib
import json
import os
import re
import subprocess
import sys

from stages.lib.data import sample

CODE = """
import hashlib, json
from stages.lib.data import sample
print(hashlib.sha256(json.dumps(list(sample.rows())).encode()).hexdigest())
"""


def test_the_same_rows_in_every_process() -> None:
    here = hashlib.sha256(json.dumps(list(sample.rows())).encode()).hexdigest()
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", CODE],
            env=os.environ | {"PYTHONHASHSEED": seed},
            text=True, capture_output=True, check=True,
        )  # fmt: skip
        assert done.stdout.strip() == here


def test_rows_are_in_shape_and_varied() -> None:
    texts = [row["text"] for row in sample.rows()]
    assert 2000 <= len(texts) <= 6000
    assert len(set(texts)) == len(texts)
    for text in texts:
        assert re.fullmatch(r"### Human: .+?### Assistant: .+", text, re.S), text
        assert " at 0x" not in text
        assert text == text.strip()
    openings = {" ".join(text.split()[2:4]) for text in texts}
    assert len(openings) > 20
