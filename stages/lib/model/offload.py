"""What layers keep for their backward pass, in the host's memory meanwhile.

A copying stream takes what a layer keeps to pinned memory while the next layers are computed, and brings it
back during the backward pass of the layer after it. The computing stream waits for a copy before the memory it
reads is free, so that the peak is planned and nothing is used too early, and before it reads what a copy wrote.
One stream copies in both directions, so that no buffer on the host is written before it was read.
"""

import contextlib
import weakref
from collections import defaultdict, deque
from collections.abc import Iterator
from typing import Any

import torch

from stages.lib.model import carrying

LEAST = 2**18  # bytes: what is smaller stays where it is
FLYING = 2  # layers whose copies may be under way when another begins
SLAB = 2**28  # bytes that are pinned at a time: torch rounds up to powers of two


class Unpinned(RuntimeError):
    """The host has no memory left that a GPU can copy to."""


class Host:
    """Buffers in the host's memory, used again and again.

    Args:
        pinned: so that copies need not wait for the processor.

    Attributes:
        taken: bytes of all buffers.
    """

    def __init__(self, pinned: bool) -> None:
        self.pinned = pinned
        self.taken = 0
        self._free: dict[int, list[torch.Tensor]] = defaultdict(list)
        self._slab = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int) -> torch.Tensor:
        """uint8 [size], whatever it holds."""
        if self._free[size]:
            return self._free[size].pop()
        room = -(-size // 512) * 512
        if room > len(self._slab):
            self._slab = self._new(max(room, SLAB if self.pinned else 0))
        found, self._slab = self._slab[:size], self._slab[room:]
        self.taken += size
        return found

    def give(self, buffer: torch.Tensor) -> None:
        """Let it be taken again."""
        self._free[len(buffer)].append(buffer)

    def _new(self, size: int) -> torch.Tensor:
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=self.pinned)
        except RuntimeError as error:
            raise Unpinned(f"after {self.taken / 2**30:.1f} GiB: {error}") from error


class Piece:
    """The bytes of one storage: `near` on the device, `far` on the host, or both; uint8 [bytes]."""

    def __init__(self, host: Host, storage: torch.UntypedStorage) -> None:
        self.host, self.size, self.place = host, storage.nbytes(), storage.device
        self.near: torch.Tensor | None = _bytes(storage)
        self.far: torch.Tensor | None = None

    def __del__(self) -> None:
        if self.far is not None:
            self.host.give(self.far)


class Load:
    """What one layer keeps in one pass; it lives as long as the graph that will ask for it.

    Attributes:
        pieces: by the address of their storage. before: the load of the layer before it.
        sent, fetched: when its last copy in that direction is done; None where nobody needs to wait.
    """

    def __init__(self, before: "weakref.ref[Load] | None") -> None:
        self.before = before
        self.pieces: dict[int, Piece] = {}
        self.sent: Any = None
        self.fetched: Any = None

    def arrive(self) -> None:
        """Let what is computed next see what was fetched."""
        if self.fetched is not None:
            torch.cuda.current_stream().wait_event(self.fetched)
            self.fetched = None

    def __del__(self) -> None:
        self.arrive()  # its memory may be another's as soon as it is gone


class Kept:
    """Where a saved tensor lies, for its way back."""

    def __init__(self, load: Load, piece: Piece, tensor: torch.Tensor) -> None:
        self.load, self.piece, self.dtype = load, piece, tensor.dtype
        self.layout = tensor.storage_offset(), tensor.size(), tensor.stride()

    def tensor(self) -> torch.Tensor:
        """The same numbers in the same layout."""
        assert self.piece.near is not None
        found = torch.empty(0, dtype=self.dtype, device=self.piece.place)
        return found.set_(self.piece.near.untyped_storage(), *self.layout)


class Offload:
    """The traffic of a model's first layers.

    Args:
        layers: those that are offloaded, in order; the last `RESIDENT` keep theirs on the device after all.
        place: where they are computed.
    """

    def __init__(self, layers: list[Any], place: torch.device) -> None:
        self.layers = layers
        self.stream = torch.cuda.Stream(place) if place.type == "cuda" else None
        self.host = Host(place.type == "cuda")
        self.flying: deque[Load] = deque()
        self.last: weakref.ref[Load] | None = None
        self._fixed: dict[int, tuple[list[int], set[int]]] = {}

    @contextlib.contextmanager
    def around(self, number: int, options: dict[str, Any]) -> Iterator[None]:
        """Take charge of what layer `number` saves; `options` are all that it is given beside its input."""
        sent = carrying.sent(len(self.layers))
        self.settle(0 if not number else FLYING if number < sent else max(sent + 1 - number, 0))
        load = Load(self.last if number else None)
        staying = self._staying(number) | _addresses(options.values())

        def pack(tensor: torch.Tensor) -> Any:
            return self._pack(load, staying, tensor)

        with torch.autograd.graph.saved_tensors_hooks(pack, self._unpack):
            yield
        self.last = weakref.ref(load)
        if number < sent:
            self._send(load)

    def settle(self, most: int = 0) -> None:
        """Have at most so many layers' copies to the host under way; what the others took is free."""
        while len(self.flying) > most:
            load = self.flying.popleft()
            if load.sent is not None:
                torch.cuda.current_stream().wait_event(load.sent)
            for piece in load.pieces.values():
                piece.near = None

    def _staying(self, number: int) -> set[int]:
        """Storages of a layer's parameters and buffers; they move when an optimizer or shards do."""
        where = [p.data_ptr() for p in self.layers[number].parameters()]
        known = self._fixed.get(number)
        if known is None or known[0] != where:
            module = self.layers[number]
            known = where, _addresses([*module.parameters(), *module.buffers()])
            self._fixed[number] = known
        return known[1]

    def _pack(self, load: Load, staying: set[int], tensor: torch.Tensor) -> Any:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address in staying or storage.nbytes() < LEAST:
            return tensor
        if address not in load.pieces:
            load.pieces[address] = Piece(self.host, storage)
        return Kept(load, load.pieces[address], tensor)

    def _send(self, load: Load) -> None:
        for piece in load.pieces.values():
            piece.far = self.host.take(piece.size)
        load.sent = self._copy([(p.far, p.near) for p in load.pieces.values()])
        self.flying.append(load)

    def _fetch(self, load: Load) -> None:
        absent = [piece for piece in load.pieces.values() if piece.near is None]
        for piece in absent:
            piece.near = torch.empty(piece.size, dtype=torch.uint8, device=piece.place)
        if absent:
            load.fetched = self._copy([(p.near, p.far) for p in absent])

    def _copy(self, pairs: list[tuple[Any, Any]]) -> Any:
        """From the second to the first of each pair, after all that was computed before; when that is done."""
        if self.stream is None:
            for to, source in pairs:
                to.copy_(source)
            return None
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for to, source in pairs:
                to.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def _unpack(self, kept: Any) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        self.settle()
        self._fetch(kept.load)
        kept.load.arrive()
        before = kept.load.before and kept.load.before()
        if before:
            self._fetch(before)
        found: torch.Tensor = kept.tensor()
        return found


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _addresses(values: Any) -> set[int]:
    """Of the storages of tensors, also in tuples."""
    found = set()
    for value in values:
        for tensor in value if isinstance(value, tuple) else (value,):
            if isinstance(tensor, torch.Tensor):
                found.add(tensor.untyped_storage().data_ptr())
    return found
