"""A model as one GGUF file: written weight by weight, read back, and compared with what it was made of."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from stages.lib.model import gguf_layout
from stages.lib.model.shards import Shards
from stages.lib.run import preemption
from stages.lib.run.exits import CannotRun, GateFailed
from stages.lib.run.progress import Progress

FILE, REPORT = "model.gguf", "export_report.json"
AUTO = "auto"
KINDS = (AUTO, "bf16", "f16", "f32", "q8_0")
STORED = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
TYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
BLOCK = 32  # numbers of q8_0 that share a scale
AT_ONCE = 1 << 24  # numbers that are compared at a time


class Sink(Protocol):
    """Takes a file's bytes in sequence."""

    def write(self, block: bytes | memoryview) -> object:
        """Append some."""


@dataclass(frozen=True)
class Tensor:
    """A weight there.

    Attributes:
        name: llama.cpp's. source: ours, or None where it follows from the config. heads: see `gguf_layout`.
        kind: one of `KINDS`, but `auto`.
    """

    name: str
    source: str | None
    shape: tuple[int, ...]
    kind: str
    heads: int | None = None


class Export:
    """A model folder and the GGUF file that it becomes.

    Args:
        folder: of the model. kind: one of `KINDS`; `auto` keeps each weight as it is.
        fields: what the file says of the tokenizer, by llama.cpp's keys. name: of the model.

    Raises:
        CannotRun: llama.cpp has no place for it, as far as is known here.
    """

    def __init__(self, folder: Path, kind: str, fields: Mapping[str, Any], name: str) -> None:
        import gguf
        from transformers import AutoConfig

        self.config = AutoConfig.from_pretrained(folder, local_files_only=True)
        self.kind, self.weights = kind, Shards(folder)
        self.architecture = gguf_layout.architecture(self.config)
        self.tensors = [
            Tensor(
                theirs, ours, self.weights.shapes[ours], self._kind(ours),
                gguf_layout.heads(self.config, ours),
            )
            for ours, theirs in gguf_layout.names(self.config, self.weights).items()
        ]  # fmt: skip
        self.factors = gguf_layout.rope_factors(self.config)
        if self.factors is not None:
            shape = tuple(self.factors.shape)
            self.tensors.append(Tensor(gguf_layout.FACTORS, None, shape, "f32"))
        whole = [tensor.kind for tensor in self.tensors if len(tensor.shape) > 1]
        most = max(set(whole), key=whole.count)
        types = gguf.LlamaFileType
        file_type = types.ALL_F32 if most == "f32" else types[f"MOSTLY_{most.upper()}"]
        self.fields: dict[str, Any] = {
            "general.architecture": self.architecture, "general.type": "model", "general.name": name,
            "general.file_type": int(file_type),
            "general.quantization_version": gguf.GGML_QUANT_VERSION,
            **gguf_layout.sizes(self.config), **fields,
        }  # fmt: skip

    def _kind(self, name: str) -> str:
        """How a weight is stored: vectors in fp32, which is what llama.cpp computes with."""
        stored = STORED.get(self.weights.types[name])
        if stored is None:
            raise CannotRun(
                f"{name} is stored as {self.weights.types[name]}; only bf16, f16 and f32 weights are exported"
            )
        shape = self.weights.shapes[name]
        if len(shape) == 1:
            return "f32"
        whole = self.kind != "q8_0" or shape[-1] % BLOCK == 0
        return self.kind if self.kind != AUTO and whole else stored

    @property
    def size(self) -> int:
        """Bytes of the weights in the file."""
        return sum(_padded(_bytes(tensor)) for tensor in self.tensors)

    def write(self, scratch: Path, sink: Sink) -> None:
        """Write the file: what it says of the model, and the weights one by one.

        Args:
            scratch: a folder for its head. sink: takes the bytes.

        Raises:
            GateFailed: a weight is too large for the type.
        """
        sink.write(self._head(scratch / "head.gguf"))
        with Progress(len(self.tensors), "tensors", name="writing") as progress:
            for tensor in self.tensors:
                preemption.check()
                packed = self._packed(tensor)
                sink.write(packed.data.cast("B"))
                sink.write(bytes(_padded(packed.nbytes) - packed.nbytes))
                progress.advance(1)

    def _head(self, path: Path) -> bytes:
        import gguf

        writer = gguf.GGUFWriter(path, self.architecture)
        writer.kv_data[0].clear()  # it has put the architecture there, as these do
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        for key, value in self.fields.items():
            if isinstance(value, list):
                writer.add_array(key, value)
            else:
                add.get(type(value), writer.add_string)(key, value)
        for tensor in self.tensors:
            writer.add_tensor_info(
                tensor.name, tensor.shape, np.dtype(np.float32), _bytes(tensor),
                gguf.GGMLQuantizationType[tensor.kind.upper()],
            )  # fmt: skip
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        head = path.read_bytes()
        path.unlink()
        return head + bytes(_padded(len(head)) - len(head))

    def _source(self, tensor: Tensor) -> torch.Tensor:
        found = self.weights[tensor.source] if tensor.source else self.factors
        assert found is not None
        return found

    def _packed(self, tensor: Tensor) -> Any:
        """The bytes of a weight, as a contiguous array."""
        import gguf

        weight = self._source(tensor)
        if tensor.heads:
            weight = weight[gguf_layout.interleaved(len(weight), tensor.heads)]
        if tensor.kind == "q8_0":
            return gguf.quants.quantize(weight.float().numpy(), gguf.GGMLQuantizationType.Q8_0)
        packed = weight.to(TYPES[tensor.kind]).contiguous()
        if not bool(packed.isfinite().all()):
            raise GateFailed(
                f"{tensor.source} has numbers that {tensor.kind} cannot hold, so nothing was published; use "
                "GGUF_TYPE=auto"
            )
        return packed.view(torch.uint8).numpy()

    def compare(self, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read the file back and hold it against the model.

        Returns:
            What the report says of the weights, and the fields that were read.

        Raises:
            GateFailed: a field or a weight is not what it should be.
        """
        import gguf

        reader = gguf.GGUFReader(path)
        read = {key: field.contents() for key, field in reader.fields.items() if key[:5] != "GGUF."}
        for key in read.keys() | self.fields.keys():
            if not _same(read.get(key), self.fields.get(key)):
                raise _differs(f"the field {key}")
        there = {tensor.name: tensor for tensor in reader.tensors}
        if there.keys() != {tensor.name for tensor in self.tensors}:
            raise _differs("the list of its weights")
        squares, errors, exact = 0.0, 0.0, 0
        for tensor in self.tensors:
            preemption.check()
            square, error = self._compare(tensor, there[tensor.name])
            squares, errors, exact = squares + square, errors + error, exact + (error == 0)
        report = {
            "architecture": self.architecture, "type": self.kind, "bytes": path.stat().st_size,
            "tensors": len(self.tensors), "exact_tensors": exact,
            "relative_error": (errors / squares) ** 0.5 if squares else 0.0,
        }  # fmt: skip
        return report, read

    def _compare(self, tensor: Tensor, there: Any) -> tuple[float, float]:
        """The squares of a weight and of what it lost, summed."""
        ours = self._source(tensor)
        shape = tuple(int(n) for n in reversed(there.shape))
        if shape != tensor.shape or there.tensor_type.name != tensor.kind.upper():
            raise _differs(f"shape or type of the weight {tensor.name}")
        square = error = 0.0
        for rows, theirs in _rows(tensor, there):
            wanted = ours[rows].float()
            lost = (theirs - wanted).abs()
            # Written so that what is no number fails.
            if not bool((lost <= _most(wanted, tensor.kind, ours.dtype)).all()):
                raise _differs(f"the weight {tensor.name}")
            square += float(wanted.double().square().sum())
            error += float(lost.double().square().sum())
        return square, error


def title(inputs: Mapping[str, Any]) -> str:
    """The name of a merged model, by what it was made of; no path of this host."""
    return f"{Path(inputs['base']['name']).name} tuned"


def _rows(tensor: Tensor, there: Any) -> Iterator[tuple[slice, torch.Tensor]]:
    """A weight that was read, dequantised and in our order, some rows at a time."""
    import gguf

    count = tensor.shape[0]
    order = np.arange(count)
    if tensor.heads:
        order = gguf_layout.halved(count, tensor.heads).numpy()
    step = max(1, AT_ONCE // int(np.prod(tensor.shape[1:], initial=1)))
    for start in range(0, count, step):
        rows = slice(start, start + step)
        packed = np.ascontiguousarray(there.data[order[rows]])
        numbers = gguf.quants.dequantize(packed, there.tensor_type)
        yield rows, torch.from_numpy(np.array(numbers, dtype=np.float32))


def _most(weight: torch.Tensor, kind: str, stored: torch.dtype) -> torch.Tensor:
    """The most that a type may lose of each number: half of its last place, and none where it was stored so."""
    if kind == "f32" or TYPES.get(kind) == stored:
        return torch.zeros(())
    if kind == "bf16":
        return weight.abs() * 2**-8
    if kind == "f16":
        return weight.abs() * 2**-11 + 2**-25
    # 127 steps to the largest of a block, whose width is itself rounded to fp16.
    largest = weight.abs().view(-1, BLOCK).amax(1, keepdim=True).expand(-1, BLOCK)
    return largest.reshape(weight.shape) * (1 / 254 + 2**-10) + 127 * 2**-25


def _bytes(tensor: Tensor) -> int:
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[tensor.kind.upper()]]
    return int(np.prod(tensor.shape)) // block * size


def _padded(size: int) -> int:
    import gguf

    return int(gguf.GGUFWriter.ggml_pad(size, gguf.GGUF_DEFAULT_ALIGNMENT))


def _same(read: Any, wanted: Any) -> bool:
    if isinstance(wanted, float):
        return bool(read == np.float32(wanted))
    if isinstance(wanted, list) and wanted and isinstance(wanted[0], float):
        return np.array_equal(np.asarray(read, np.float32), np.asarray(wanted, np.float32))
    return bool(read == wanted)


def _differs(what: str) -> GateFailed:
    return GateFailed(
        f"{what} was read back from {FILE} otherwise than it is in the model, so it was not published; look at "
        "the disk and at the version of gguf"
    )
