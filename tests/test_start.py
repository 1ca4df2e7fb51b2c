"""What a stage does before it does anything."""

import json
import subprocess
import sys
from pathlib import Path

from tests.conftest import clean_environment

ASKED = """
import json, sys
from stages.__main__ import main
from stages.lib.data import sources
hashed, own = [], sources.sha256
sources.sha256 = lambda path: (hashed.append(str(path)), own(path))[1]
try:
    main()
finally:
    heavy = {"torch", "transformers", "datasets", "pandas"} & sys.modules.keys()
    print(json.dumps([sorted(heavy), hashed]))
"""


def test_prepare_data_imports_nothing_slow_and_hashes_a_source_once(
    sample_model: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    texts = [f"### Human: {n}?### Assistant: {n}." for n in range(20)]
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = ("--dataset", str(rows), "--base-model", str(sample_model), "--run-dir", "run")
    done = subprocess.run(
        [sys.executable, "-c", ASKED, "prepare-data", *settings], cwd=tmp_path, text=True,
        env=clean_environment(tmp_path), capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [[], [str(rows)]]
