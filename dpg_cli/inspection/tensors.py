"""safetensors files, looked at without believing them: the library checks the header, values are mapped and read in parts.

Free of torch. Pickles are refused by name and by content.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from dpg_cli.errors import UsageError
from dpg_cli.escape import printable

LARGEST_HEADER = 32 * 2**20  # bytes: some 300,000 tensors
CHUNK = 2**22  # values read at once
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I64": np.int64, "I32": np.int32,
    "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.uint8,
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file.

    Attributes:
        name: as the file has it; not fit for a terminal unescaped.
        dtype: in the words of safetensors.
        shape: its axes.
        start: byte at which its values begin.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """Number of values."""
        size = 1
        for length in self.shape:
            size *= length
        return size


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file whose header was checked.

    Attributes:
        path: the file.
        tensors: by name, in the order of their bytes.
        metadata: the header's free text.
    """

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    @property
    def size(self) -> int:
        """Number of values of all tensors."""
        return sum(tensor.size for tensor in self.tensors.values())

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Values of a tensor, or of some of its rows, as floating-point or whole numbers.

        Raises:
            UsageError: if its type cannot be read here.
        """
        tensor = self.tensors[name]
        kind = _DTYPES.get(tensor.dtype)
        if kind is None:
            raise UsageError(
                f"Values of type {tensor.dtype} in {self.path} cannot be shown.", "Convert the file first."
            )
        if tensor.size == 0:
            return np.zeros(tensor.shape, dtype=kind)
        mapped = np.memmap(self.path, dtype=kind, mode="r", offset=tensor.start, shape=tensor.shape or (1,))
        values = np.array(mapped[start:stop] if tensor.shape else mapped.reshape(()))
        if tensor.dtype == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32) if tensor.dtype == "F16" else values

    def blocks(self, name: str, step: int = 1) -> Iterator[np.ndarray]:
        """A tensor in blocks of rows, `CHUNK` values or so each; a block's rows are a multiple of `step` but for the last."""
        tensor = self.tensors[name]
        if len(tensor.shape) < 1 or tensor.size == 0:
            yield self.rows(name)
            return
        width = max(1, tensor.size // tensor.shape[0])
        block = max(1, CHUNK // width // step) * step
        for start in range(0, tensor.shape[0], block):
            yield self.rows(name, start, start + block)

    def norm(self, name: str) -> float:
        """l2 norm of a tensor, summed in float64."""
        with np.errstate(over="ignore", invalid="ignore"):
            return float(np.sqrt(sum(float(np.sum(np.square(b.astype(np.float64)))) for b in self.blocks(name))))


def refuse_pickle(path: Path) -> None:
    """Refuse a file whose name says that loading it would run code.

    Raises:
        UsageError: naming it.
    """
    if path.suffix.lower() in PICKLES:
        raise UsageError(
            f"{path} is a pickle by its name, and is not opened: loading one can run any code.",
            "Convert it to safetensors.",
        )


def _odd_beginning(path: Path, first: bytes) -> UsageError | None:
    """What to say of a file that the library refuses and that begins as pickles or archives do. A good file can begin so
    too: the bytes are the length of its header."""
    if first[:2] != b"PK" and first[:1] != b"\x80":
        return None
    return UsageError(f"{path} is a pickle or an archive under another name.", "Convert it to safetensors.")


def read_header(path: Path) -> TensorFile:
    """Names, types and shapes of the tensors of a safetensors file.

    Raises:
        UsageError: if it is missing, is a pickle, or is damaged or hostile in any way that the library checks.
    """
    refuse_pickle(path)
    try:
        if not path.is_file():
            raise UsageError(f"{path} is missing or no ordinary file.", "Check the path.")
        with path.open("rb") as file:
            first = file.read(8)
            length = int.from_bytes(first, "little")
        if len(first) < 8 or length > LARGEST_HEADER:
            raise _odd_beginning(path, first) or UsageError(
                f"{path} is no safetensors file: its header is cut short or too large.", "Take another copy."
            )
        with safe_open(path, framework="np"):
            pass  # the library checks names, types, shapes and offsets against the file
        with path.open("rb") as file:
            header = json.loads(file.read(8 + length)[8:])
    except SafetensorError as error:
        if (pickle := _odd_beginning(path, first)) is not None:
            raise pickle from None
        reason = printable(error, 160).removeprefix("Error while deserializing header: ")
        raise UsageError(f"{path} is damaged or no safetensors file: {reason}.", "Take another copy.") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise UsageError(f"{path} cannot be read: {reason}.", "Check the file.") from None
    metadata = header.pop("__metadata__", None) or {}
    tensors = [
        Tensor(name, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    ]
    ordered = {tensor.name: tensor for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.name))}
    return TensorFile(path, ordered, metadata)
