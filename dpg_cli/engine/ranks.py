"""The processes that share a run (*ranks*): which rows each takes, and what they add up and gather.

A run by one process is the ordinary case, and `ALONE` makes every method here do nothing. With more, each rank holds whole
models and does its share of the rows of everything that is linear in them: a gradient, a Hessian-vector product and a
credit are sums over examples, so that a sum over ranks of what each made of its own rows is the value of the whole
batch. What every rank computes for itself (optimiser steps, adjoints, the metric) starts from such sums, which reach all
of them bit for bit alike. Whoever sets the processes up (`dpg_cli.driver.launch`, TRL) has initialised `torch.distributed`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dpg_cli.errors import LostProcessError

CPU = torch.device("cpu")
BUCKET = 1 << 24  # numbers that are summed in one message


@contextmanager
def talking() -> Iterator[None]:
    """What goes wrong between processes is, nearly always, that one of them is gone."""
    try:
        yield
    except RuntimeError as error:
        first = re.sub(r"^\[[^]]*\]\s*", "", str(error)).partition("\n")[0]  # without the place in a library's source
        raise LostProcessError(first.partition(". ")[0]) from error


@dataclass(frozen=True)
class Ranks:
    """This process among those that share a run.

    Attributes:
        rank: its number, from 0.
        world: how many there are.
        device: where messages are made up; an accelerator's own for nccl, the CPU for gloo.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = CPU

    @classmethod
    def joined(cls, device: torch.device | str = "cpu") -> Ranks:
        """This process in the default group of `torch.distributed`; `ALONE` where there is none.

        Args:
            device: where the models are; messages are made up there if nccl carries them.
        """
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return ALONE
        on_device = "nccl" in str(dist.get_backend())
        return cls(dist.get_rank(), dist.get_world_size(), torch.device(device) if on_device else CPU)

    @property
    def first(self) -> bool:
        """Rank 0: the one that writes, and that decides where only one may."""
        return self.rank == 0

    def shard(self, count: int) -> slice:
        """The rows of `count` that are this rank's: one block, of a size that differs by one at most; it may be empty."""
        return slice(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def sizes(self, count: int) -> list[int]:
        """How many rows of `count` each rank has."""
        return [count * (rank + 1) // self.world - count * rank // self.world for rank in range(self.world)]

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace a contiguous tensor by its sum over the ranks."""
        if self.world > 1:
            with talking():
                for part in tensor.view(-1).split(BUCKET):
                    there = part.to(self.device)
                    dist.all_reduce(there)
                    if there is not part:
                        part.copy_(there)
        return tensor

    def total(self, number: float) -> float:
        """The sum of a number over the ranks."""
        if self.world == 1:
            return number
        return float(self.sum_(torch.tensor([number], dtype=torch.float64))[0])

    def largest(self, number: int) -> int:
        """The largest of an integer over the ranks."""
        if self.world == 1:
            return number
        with talking():
            value = torch.tensor([number], device=self.device)
            dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return int(value)

    def gather(self, own: Tensor, fill: float = 0) -> Tensor:
        """The rows of all ranks, in the order of the ranks.

        Args:
            own: this rank's rows, (n, ...); n may be 0, and the second axis may be shorter than elsewhere.
            fill: what a second axis is padded with on the right.
        """
        if self.world == 1:
            return own
        with talking():
            shape = torch.tensor([len(own), own.shape[1] if own.ndim > 1 else 1], device=self.device)
            shapes = [torch.empty_like(shape) for _ in range(self.world)]
            dist.all_gather(shapes, shape)
            counts, widths = zip(*(s.tolist() for s in shapes), strict=True)
            most, width = max(counts), max(widths)
            padding = [0, 0] * max(0, own.ndim - 2) + ([0, width - own.shape[1]] if own.ndim > 1 else [])
            plain = own.to(torch.uint8) if own.dtype == torch.bool else own
            plain = torch.nn.functional.pad(plain, padding, value=fill) if any(padding) else plain
            block = plain.new_zeros((most, *plain.shape[1:]), device=self.device)
            block[: len(plain)] = plain
            blocks = [torch.empty_like(block) for _ in range(self.world)]
            dist.all_gather(blocks, block)
        rows = torch.cat([part[:count] for part, count in zip(blocks, counts, strict=True)])
        return rows.to(device=own.device, dtype=own.dtype)

    def copy_from_first_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by rank 0's."""
        if self.world > 1:
            with talking():
                there = tensor.detach().to(self.device).contiguous()
                dist.broadcast(there, 0)
            with torch.no_grad():
                tensor.copy_(there)
        return tensor

    def agreed(self, value: Any) -> Any:
        """Rank 0's value, on every rank; one that JSON holds."""
        if self.world == 1:
            return value
        data = json.dumps(value).encode() if self.first else b""
        size = self.largest(len(data))
        buffer = torch.zeros(size, dtype=torch.uint8)
        if self.first:
            buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        return json.loads(bytes(self.copy_from_first_(buffer).tolist()))

    def any(self, flag: bool) -> bool:
        """Whether it holds on some rank."""
        return bool(self.largest(int(flag)))

    def wait(self) -> None:
        """Until every rank is here."""
        self.largest(0)


ALONE = Ranks()
