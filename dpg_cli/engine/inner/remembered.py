"""What an inner step's first-order pass has made already, so that the dual pass over the same rows need not make it again.

The dual pass repeats the inner step twice over. Its primal values are those of the step's forward; and since Σ c ℓ̇ is
linear in the tangents, its adjoints of tangents, Ẋ̄, are the step's own adjoints X̄. Of the eleven forward-sized products of
a step and its dual pass that is two: X Wᵀ + b and X̄ = Ȳ W of every linear map, and h̄ of the LM head. They take the memory
of activations, about 16 hidden vectors a token and layer, so there is a limit, beyond which only the last steps are
remembered: those that the reverse pass begins with.

None of them depends on the direction. Where several directions pass over the same rows, the first dual pass may leave them
itself (`recording`), and all but the last one leave them there (`shared`).
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

LIMIT = 1 << 29  # bytes of an inner run's products

Place = tuple[int, torch.Size]  # of a weight: where it begins in θ, and its shape


def place_of(weight: Tensor) -> Place:
    """What tells a weight from the others of a model, in both passes."""
    return int(weight.storage_offset()), weight.shape


@dataclass(eq=False)
class Room:
    """How many bytes may be kept, and are. Whatever counts against it holds it, and it holds nothing: no cycles keep memory.

    Attributes:
        limit: bytes.
        bytes: of all tensors that were admitted.
        recording: dual passes leave what they make.
        shared: what is taken stays there, and copies are given: another pass will come.
    """

    limit: int
    bytes: int = 0
    recording: bool = False
    shared: bool = False

    def admits(self, tensor: Tensor) -> bool:
        """Whether there is room for a tensor; it is counted if so."""
        size = tensor.numel() * tensor.element_size()
        if self.bytes + size > self.limit:
            return False
        self.bytes += size
        return True


@dataclass(eq=False)
class Products:
    """What one call of a linear map made.

    Attributes:
        room: what it counts against.
        out: X Wᵀ + b, shape (..., out), or None.
        x_bar: X̄, shape (rows, in), or None.
    """

    room: Room
    out: Tensor | None = None
    x_bar: Tensor | None = None
    version: int = 0

    def keep(self, *, out: Tensor | None = None, x_bar: Tensor | None = None) -> None:
        """Take these, while there is room."""
        if out is not None and self.room.admits(out):
            self.out, self.version = out, out._version
        if x_bar is not None and self.room.admits(x_bar):
            self.x_bar = x_bar

    def take_out(self, rows: int) -> Tensor | None:
        """`out` as a matrix, given away; None if it was of other rows than these, or the model has written to it since."""
        out = self.out
        if not self.room.shared:
            self.out = None
        if out is None or out._version != self.version:
            return None
        out = out.reshape(-1, out.shape[-1])
        if len(out) != rows:
            return None
        return out.clone() if self.room.shared else out

    def take_x_bar(self, rows: int) -> Tensor | None:
        """`x_bar`, given away; None if it was of other rows than these."""
        x_bar = self.x_bar
        if not self.room.shared:
            self.x_bar = None
        if x_bar is None or len(x_bar) != rows:
            return None
        return x_bar.clone() if self.room.shared else x_bar

    @property
    def records(self) -> bool:
        """Whether a dual pass leaves what it makes here."""
        return self.room.recording


@dataclass(eq=False)
class Piece:
    """The products of one micro-batch.

    Attributes:
        room: what they count against.
        linears: of each linear map of the backbone, in the order of its calls.
        hidden_bar: h̄ of the labelled tokens, shape (M, D), or None.
        again: those that were handed out and are kept for another pass.
    """

    room: Room
    linears: dict[Place, deque[Products]] = field(default_factory=lambda: defaultdict(deque))
    hidden_bar: Tensor | None = None
    again: dict[Place, deque[Products]] = field(default_factory=lambda: defaultdict(deque))

    def add(self, weight: Tensor) -> Products:
        """For a first-order pass: where the next call of this weight's map puts what it makes."""
        products = Products(self.room)
        self.linears[place_of(weight)].append(products)
        return products

    def next(self, weight: Tensor) -> Products | None:
        """For a dual pass: what the next call of this weight's map has made before."""
        if self.room.recording:
            return self.add(weight)
        known = self.linears.get(place_of(weight))
        if not known:
            return None
        products = known.popleft()
        if self.room.shared:
            self.again[place_of(weight)].append(products)
        return products

    def keep_hidden_bar(self, hidden_bar: Tensor) -> None:
        """Take h̄, while there is room."""
        if self.room.admits(hidden_bar):
            self.hidden_bar = hidden_bar


class Remembered:
    """The products of one inner step, in the order of its micro-batches.

    Args:
        limit: bytes that it may take.
        recording: dual passes leave what they make, until `rewind`.
    """

    def __init__(self, limit: int = LIMIT, *, recording: bool = False) -> None:
        self.room = Room(limit, recording=recording)
        self.pieces: deque[Piece] = deque()
        self.again: deque[Piece] = deque()

    @property
    def bytes(self) -> int:
        """Of all that it has taken."""
        return self.room.bytes

    def add(self) -> Piece:
        """For a first-order pass: the next micro-batch."""
        self.pieces.append(Piece(self.room))
        return self.pieces[-1]

    def next(self) -> Piece | None:
        """For a dual pass: the next micro-batch, given away unless it is shared."""
        if self.room.recording:
            return self.add()
        if not self.pieces:
            return None
        piece = self.pieces.popleft()
        if self.room.shared:
            self.again.append(piece)
        return piece

    def rewind(self, *, shared: bool) -> None:
        """Another dual pass begins: what the ones before left is there for it; `shared`: yet another one will follow."""
        if self.room.recording or self.room.shared:
            self.pieces = self.again or self.pieces
            self.again = deque()
            for piece in self.pieces:
                if not self.room.recording:
                    piece.linears, piece.again = piece.again, defaultdict(deque)
        self.room.recording, self.room.shared = False, shared
