"""`make image-test`: the tests of the image, on an engine; where none can run it is said, and is a failure."""

import os
import sys
from pathlib import Path

import pytest

from tests.image.engine import NoEngine, base, engine

SWITCH = "LORA_STAGES_BASE"  # the tests are collected where it is set
# By the make that runs this, to the one that is tested.
EXPORTED = ("PROMPT", "RUN_DIR", "IMAGE", "MAKE_GIVEN")


def main() -> int:
    """Start an engine if need be, make the base image, and run the tests."""
    try:
        with engine() as found:
            os.environ.update(found, **{SWITCH: base(found)})
            for name in EXPORTED:
                os.environ.pop(name, None)
            asked = sys.argv[1:] or [str(Path(__file__).parent)]
            return int(pytest.main(["-v", *asked]))
    except NoEngine as error:
        print(f"image-test: NOT RUN: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
