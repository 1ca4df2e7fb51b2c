"""`fusermount3 -o OPTIONS -- FOLDER` for root, where Debian's fuse3 is not installed.

Opens /dev/fuse, mounts it, and sends the open file through the socket that _FUSE_COMMFD names.
"""

import ctypes
import os
import socket
import sys

MS_NOSUID, MS_NODEV = 2, 4
OURS = ("rw", "ro", "fsname", "subtype", "nosuid", "nodev", "nonempty", "auto_unmount")


def main(arguments: list[str]) -> None:
    given = arguments[arguments.index("-o") + 1].split(",") if "-o" in arguments else []
    named = dict(option.partition("=")[::2] for option in given)
    handle = os.open("/dev/fuse", os.O_RDWR)
    told = [f"fd={handle}", "rootmode=40000", f"user_id={os.getuid()}", f"group_id={os.getgid()}"]
    told += [option for option in given if option.partition("=")[0] not in OURS]
    kind = f"fuse.{named['subtype']}" if "subtype" in named else "fuse"
    libc = ctypes.CDLL(None, use_errno=True)
    words = [word.encode() for word in (named.get("fsname", "fuse"), arguments[-1], kind)]
    if libc.mount(*words, MS_NOSUID | MS_NODEV, ",".join(told).encode()):
        sys.exit(f"mount: {os.strerror(ctypes.get_errno())}")
    with socket.socket(fileno=int(os.environ["_FUSE_COMMFD"])) as parent:
        socket.send_fds(parent, [b"\0"], [handle])


if __name__ == "__main__":
    main(sys.argv[1:])
