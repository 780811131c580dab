"""One run by several processes: joining them, watching that all of them live, one message when one fails.

The processes are started by `accelerate launch` or `torchrun`, which tell each its place by environment variables;
Accelerate joins them (gloo on the CPU, nccl on GPUs). From then on each counts up a beat of its own and looks at its
neighbour's, in a thread that a waiting main thread does not hold up: where a process fails, hangs or is killed, the others
end within seconds, however long the message that they wait for may take. Whoever is first to notice speaks; the rest are silent.

Free of torch until there is more than one process.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from dpg_cli.errors import LostProcessError, UsageError, one_line

if TYPE_CHECKING:
    from dpg_cli.engine.ranks import Ranks

SIZE_NAMES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
BEAT = 0.5  # seconds between two looks
PATIENCE = 15.0  # seconds without a neighbour's beat
GRACE = 4.0  # seconds that the main thread has to end by itself, once it is known that it must
JOINING = timedelta(minutes=10)
FOREVER = timedelta(days=7)  # of a message: the watch notices a lost process long before


def processes() -> int:
    """How many processes the launcher started, by its environment variables."""
    for name in SIZE_NAMES:
        if os.environ.get(name, "").isdigit():
            return max(1, int(os.environ[name]))
    return 1


class Watch(threading.Thread):
    """Beats, and looks whether the neighbour does.

    Args:
        store: a key-value store that all processes reach, by a connection of its own.
        rank, world: this process's place.
    """

    def __init__(self, store: Any, rank: int, world: int) -> None:
        super().__init__(name="dpg-watch", daemon=True)
        self.store, self.rank, self.world = store, rank, world
        self.done = threading.Event()
        self.lock = threading.Lock()
        self.spoken = False
        self.advice = ""

    def speaks(self) -> bool:
        """Whether this process is the first to have something to say; asking counts as saying it."""
        with self.lock:
            if self.spoken:
                return False
            self.spoken = True
            try:
                return self.store.add("ended", 1) == 1
            except RuntimeError:  # the store went with the process that held it
                return self.rank == min(1, self.world - 1)

    def run(self) -> None:
        """Until `done`, or until a process is lost; then end this one."""
        neighbour, seen, quiet = (self.rank + 1) % self.world, 0, 0.0
        reason = ""
        while not self.done.wait(BEAT):
            try:
                self.store.add(f"beat {self.rank}", 1)
                beats = self.store.add(f"beat {neighbour}", 0)
                ended = self.store.add("ended", 0)
            except RuntimeError:
                reason = "the launcher is gone"
                break
            quiet = quiet + BEAT if beats == seen else 0.0
            seen = beats
            if ended:
                reason = "it failed"
                break
            if quiet > PATIENCE:
                reason = f"rank {neighbour} gave no sign for {PATIENCE:.0f} s"
                break
        if not reason or self.done.wait(GRACE):
            return
        if self.speaks():
            error = LostProcessError(reason, self.advice)
            sys.stderr.write(f"dpg: {one_line(str(error))}\n")
        leave(LostProcessError.exit_code)


_watch: Watch | None = None


def advise(remedy: str) -> None:
    """What the user can do when a process is lost."""
    if _watch is not None:
        _watch.advice = remedy


def shared() -> bool:
    """Whether this process is one of several."""
    return _watch is not None


def speaks() -> bool:
    """Whether this process may print an error: always alone; else only the first that has one."""
    return _watch is None or _watch.speaks()


def leave(code: int) -> NoReturn:
    """End this process at once if it is one of several: no other thread and no open connection can hold it up."""
    if _watch is None:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Within, the processes that the launcher started share the run; alone, nothing happens.

    Args:
        device: as the settings name it; with several processes `auto` and `cuda` are each process's own GPU.

    Raises:
        UsageError: if they cannot be joined.
        LostProcessError: if another one ends before it is done.
    """
    global _watch
    from dpg_cli.engine.ranks import ALONE

    if processes() == 1:
        if "MASTER_ADDR" in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ:
            sys.stderr.write(
                "warning: Accelerate started one process; without GPUs it needs --multi_gpu (also on the CPU) or MPI "
                "to start more, and torchrun needs neither.\n"
            )
        yield ALONE
        return
    ranks, _watch = _join(device)
    _watch.start()
    yield ranks
    ranks.wait()  # what rank 0 still writes is part of the run
    _watch.done.set()
    _watch = None

    import torch.distributed as dist

    dist.destroy_process_group()


def _join(device: str) -> tuple[Ranks, Watch]:
    """Join the default process group through Accelerate."""
    import torch
    import torch.distributed as dist
    from accelerate import PartialState
    from accelerate.utils.environment import get_cpu_distributed_information

    from dpg_cli.engine.ranks import Ranks

    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(
            f"Device {device!r} is for one process; {processes()} were started.",
            "Give --device cuda (each takes the GPU of its local rank), cpu, or nothing.",
        )
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    place = get_cpu_distributed_information()  # also of MPI's variables
    try:
        store, rank, world = next(iter(dist.rendezvous("env://", place.rank, place.world_size, timeout=JOINING)))
        state = PartialState(cpu=on_cpu, timeout=FOREVER, store=store, rank=rank, world_size=world)
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(
            f"The {processes()} processes cannot be joined: {reason}.", "See docs/scaling.md for launch lines."
        ) from error
    watch = Watch(dist.PrefixStore("dpg", store.clone()), rank, world)
    return Ranks(rank, world, torch.device("cpu") if on_cpu else state.device), watch
