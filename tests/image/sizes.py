"""What the wheels of a lock weigh, by the index: `python -m tests.image.sizes cu13` prints JSON, in bytes."""

import json
import os
import re
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor

from tests.conftest import ROOT

INDEX = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/")
FORM = "application/vnd.pypi.simple.v1+json"
# Of the wheels of a version, the first kind that there is; Python 3.12 is that of the usual base.
KINDS = ("cp312-cp312-manylinux", "abi3-manylinux", "-any", "-manylinux")


def pins(variant: str) -> dict[str, str]:
    """Version by package, as a lock has them."""
    text = (ROOT / "env" / "locks" / f"{variant}.txt").read_text()
    return dict(re.findall(r"^([a-z0-9][\w.-]*)==(\S+)", text, re.M))


def weight(package: str, version: str) -> int:
    """Bytes of the wheel for x86-64.

    Raises:
        LookupError: the index has none.
    """
    request = urllib.request.Request(f"{INDEX}/{package}/", headers={"Accept": FORM})
    with urllib.request.urlopen(request, timeout=90) as answer:
        files = json.load(answer)["files"]
    here = [
        file
        for file in files
        if file["filename"].endswith(("x86_64.whl", "any.whl"))
        and file["filename"].split("-")[1] == version
    ]
    for kind in KINDS:
        if found := [file["size"] for file in here if kind in file["filename"]]:
            return int(max(found))
    raise LookupError(f"no wheel of {package} {version} for x86-64 is at {INDEX}")


def main(variant: str) -> None:
    """Print the sum, and the heaviest."""
    wanted = pins(variant)
    with ThreadPoolExecutor(4) as pool:
        sizes = dict(zip(wanted, pool.map(weight, wanted, wanted.values()), strict=True))
    heaviest = dict(sorted(sizes.items(), key=lambda item: -item[1])[:8])
    said = {
        "variant": variant,
        "wheels": len(sizes),
        "bytes": sum(sizes.values()),
        "heaviest": heaviest,
    }
    print(json.dumps(said, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
