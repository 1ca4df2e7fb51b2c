"""Where a process stands among those that train together, and a host among its job's."""

import re
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Rank:
    """This process among those that train together, as its launcher numbered it.

    Attributes:
        number, count: of all of them. near: how many are on this host. address, port: of their store.
        served: the launcher holds the store; else the first process does.
        folder: where the ends of this host's processes are left, if we started them. parent: who did, or 0.
    """

    number: int
    count: int
    near: int
    address: str
    port: int
    served: bool = False
    folder: Path | None = None
    parent: int = 0


@dataclass(frozen=True)
class Hosts:
    """How many hosts share the work, which of them this is, and where the first one is reached."""

    count: int = 1
    number: int = 0
    address: str = ""
    port: int = 29500


def first_host(names: str) -> str:
    """The first of `node[03-07,11],other`, which is how Slurm writes many."""
    form = re.match(r"([^,\[]*)(?:\[(\w+)[^\]]*\])?([^,]*)", names)
    return form[1] + (form[2] or "") + form[3] if form else names


def own_address(address: str, port: int) -> str:
    """The address by which this host reaches another; no packet is sent.

    Raises:
        OSError: it does not.
    """
    for family, kind, protocol, _, place in socket.getaddrinfo(
        address, port, type=socket.SOCK_DGRAM
    ):
        with socket.socket(family, kind, protocol) as there:
            there.connect(place)
            return str(there.getsockname()[0])
    raise OSError(f"{address} has no address")


def interface(address: str) -> str | None:
    """The network interface by which this host reaches another; None where it is the loop."""
    import psutil

    own = own_address(address, 9)
    for name, addresses in psutil.net_if_addrs().items():
        if own in [each.address.partition("%")[0] for each in addresses]:
            return None if own.startswith("127.") or own == "::1" else str(name)
    return None
