"""The work folder of an attribution: what it needs to go on after a kill, beside the scores until they are written.

    work.json             what it was begun with; a command that differs in any of it is refused
    group-G.safetensors   the scores of a group of queries that is done, where there are several
    group-G/              the run of one that is not:

    tape.bin              `offload`: the steps of the forward run, one after the other
    state-N.safetensors   `sqrt`: the state before step N, of every √T-th step
    forward.json          how many steps may be relied on, and their figures
    final.safetensors     θ_T, and the figures of all steps
    reverse.safetensors   the newest point of the reverse: adjoints, credits so far; with it begins the reverse

Every file but the tape appears under its name when all of it has reached the disk, and the tape is relied on as far as
`forward.json` says. Points lie √T steps apart both ways, so that a kill costs at most as many steps; states that the newest
point of the reverse makes needless are removed. Nothing here is unpickled.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dpg_cli.engine.inner.journal import Backward, Begun, Course
from dpg_cli.engine.inner.optimizers import State
from dpg_cli.engine.inner.tape import Memory, OffloadTape, SqrtTape, Tape, segment_length
from dpg_cli.errors import UsageError
from dpg_cli.runs.files import TEMPORARY, locked, os_reason, reading, replacing, sync, write_json, writing
from dpg_cli.settings.config import shown

LASTING = ("sqrt", "offload")
SPARE = 1.02  # of the disk that is asked for: headers and figures
Key = dict[str, Any]


def work_folder(out: Path) -> Path:
    """The work folder of scores that go to `out`."""
    return out.with_name(f"{out.name}.work")


def most_bytes(memory: Memory, steps: int, parameters: int, element: int, queries: int, tokens: int) -> int:
    """The most that a work folder takes.

    Args:
        memory: "sqrt" or "offload".
        steps: that are made.
        parameters: n, of those that are trained.
        element: bytes of a number.
        queries: Q.
        tokens: N · S, pads included.
    """
    point = queries * (3 * parameters + tokens)
    states = 3 * parameters * -(-steps // segment_length(steps)) if memory == "sqrt" else 4 * parameters * steps
    return int(SPARE * element * (states + parameters + 2 * point))


class FolderStates:
    """States of segments in files, as `tape.States`. What is popped stays on the disk until `Work` removes it."""

    def __init__(self, folder: Path, length: int, like: Tensor) -> None:
        self.folder, self.length, self.like, self.count = folder, length, like.new_empty(0), 0
        self.size = len(like)

    def __len__(self) -> int:
        return self.count

    def path(self, place: int) -> Path:
        """The file of a state."""
        return self.folder / f"state-{place * self.length}.safetensors"

    def append(self, state: State, /) -> None:
        """See `tape.States`."""
        named = {name: vector[:1] if _is_zero(vector) else vector for name, vector in state._asdict().items()}
        write_tensors(self.path(self.count), named)
        self.count += 1

    def pop(self) -> State:
        """See `tape.States`."""
        self.count -= 1
        return State(self.like, self.like, self.like)

    def __getitem__(self, place: int, /) -> State:
        found, _ = read_tensors(self.path(range(self.count)[place]), self.like)
        vectors = [found[name] for name in State._fields]
        return State(*(v.expand(self.size) if len(v) == 1 < self.size else v for v in vectors))


def _is_zero(vector: Tensor) -> bool:
    """Whether a vector is zeros without memory of their own."""
    return len(vector) > 1 and vector.stride(0) == 0


class Work:
    """A work folder in use, as the engine's `Journal`.

    Args:
        folder: it exists, and is this process's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.forward = folder / "forward.json"
        self.final, self.point = folder / "final.safetensors", folder / "reverse.safetensors"
        self.made: SqrtTape | OffloadTape | None = None
        self.file: BinaryIO | None = None
        self.length = self.total = 1

    def tape(
        self,
        memory: Memory,
        total: int,
        like: Tensor,
        gradient: Callable[[int, Tensor], Tensor],
        update: Callable[[int, State, Tensor], State],
    ) -> Tape:
        """See `Journal`."""
        self.total, self.length = total, segment_length(total)
        figures, left = self._figures(), self._left()
        done = figures.get("done", -1)
        if memory == "sqrt":
            states = FolderStates(self.folder, self.length, like)
            states.count = done // self.length + 1 if left is None else -(-left // self.length)
            self.made = SqrtTape(total, gradient, update, states)
        elif memory == "offload":
            with writing(self.folder):
                path = self.folder / "tape.bin"
                path.touch()
                self.file = path.open("r+b", buffering=0)
            self.made = OffloadTape(total, like, self.file)
            index = figures.get("tape", [])
            self.made.restore(index[: done + 1 if left is None else left])
            self.made.cut()
        else:
            raise UsageError("States that are kept in memory end with the process.", "Choose sqrt or offload.")
        return self.made

    def begun(self, like: Tensor) -> Begun | None:
        """See `Journal`."""
        figures = self._figures()
        if not figures:
            return None
        course = Course(figures["norms"], figures["losses"], figures["gradient_median"])
        if "done" not in figures:
            final, _ = read_tensors(self.final, like)
            nothing = like.new_empty(0)
            return Begun(self.total, State(final["theta"], nothing, nothing), course)
        assert self.made is not None
        done, state = self.made.resume()
        return Begun(done, state, course)

    def stepped(self, done: int, course: Course) -> None:
        """See `Journal`."""
        if done and done % self.length == 0:
            write_json(self.forward, {"done": done, **self._said(course)})

    def backward(self, like: Tensor) -> Backward | None:
        """See `Journal`."""
        if not self.point.exists():
            return None
        found, about = read_tensors(self.point, like)
        queries = int(about["queries"])
        bars = [State(*(found[f"{query}.{name}"] for name in State._fields)) for query in range(queries)]
        visits = [found[f"visits.{number}"] for number in range(int(about["visits"]))]
        return Backward(
            int(about["left"]),
            bars,
            found["tokens"],
            visits,
            json.loads(about["values"]),
            json.loads(about["measures"]),
            json.loads(about["differences"]),
        )

    def turned(self, theta: Tensor, course: Course, point: Backward) -> None:
        """See `Journal`."""
        write_tensors(self.final, {"theta": theta}, {"figures": json.dumps(self._said(course))})
        self._write_point(point)

    def reversed(self, point: Backward) -> None:
        """See `Journal`."""
        if point.left % self.length:
            return
        self._write_point(point)
        self._remove_states(point.left)

    def _said(self, course: Course) -> dict[str, Any]:
        """The figures of the steps, and where the tape has them, all of which has reached the disk."""
        index = None
        if isinstance(self.made, OffloadTape) and self.file is not None:
            with writing(self.folder / "tape.bin"):
                sync(self.folder / "tape.bin")
            index = self.made.index()
        return {**asdict(course), "tape": index}

    def _write_point(self, point: Backward) -> None:
        tensors = {
            f"{query}.{name}": vector for query, bar in enumerate(point.bars) for name, vector in bar._asdict().items()
        }
        tensors["tokens"] = point.token_Q_N_S
        tensors |= {f"visits.{number}": credit for number, credit in enumerate(point.visits)}
        about = {
            "left": str(point.left),
            "queries": str(len(point.bars)),
            "visits": str(len(point.visits)),
            "values": json.dumps(point.values),
            "measures": json.dumps(point.measures),
            "differences": json.dumps(point.differences),
        }
        write_tensors(self.point, tensors, about)

    def _remove_states(self, left: int) -> None:
        """Give back the disk of steps that are reversed."""
        if isinstance(self.made, OffloadTape):
            with writing(self.folder / "tape.bin"):
                self.made.cut()
            return
        with writing(self.folder):
            for path in self.folder.glob("state-*.safetensors"):
                if int(path.stem.removeprefix("state-")) >= left:
                    path.unlink()

    def _figures(self) -> dict[str, Any]:
        """The figures of the steps so far, `done` of them, or of all where the reverse has begun; empty before the first."""
        if self.point.exists():
            with reading_tensors(self.final), safe_open(self.final, "pt") as file:
                return dict(json.loads(file.metadata()["figures"]))
        if not self.forward.exists():
            return {}
        try:
            with reading(self.forward):
                return dict(json.loads(self.forward.read_bytes()))
        except ValueError:
            raise damaged(self.forward) from None

    def _left(self) -> int | None:
        """Steps that are not reversed yet; None where the forward run is not at its end."""
        if not self.point.exists():
            return None
        with reading_tensors(self.point), safe_open(self.point, "pt") as file:
            return int(file.metadata()["left"])


class WorkFolder:
    """The work folder of all groups of an attribution.

    Args:
        folder: it exists, and is this process's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def journal(self, group: int) -> Iterator[Work]:
        """The journal of one group's run."""
        place = self.folder / f"group-{group}"
        with writing(place):
            place.mkdir(exist_ok=True)
            for path in place.iterdir():
                if TEMPORARY.fullmatch(path.name):
                    path.unlink()
        work = Work(place)
        try:
            yield work
        finally:
            if work.file is not None:
                work.file.close()

    def finished(self, group: int, like: Tensor) -> tuple[Tensor, dict[str, Any]] | None:
        """The credits of a group that is done, (Q, N, S), and its figures; None while it is not."""
        path = self.folder / f"group-{group}.safetensors"
        if not path.exists():
            return None
        found, about = read_tensors(path, like)
        return found["tokens"], dict(json.loads(about["figures"]))

    def finish(self, group: int, tokens: Tensor, figures: dict[str, Any]) -> None:
        """A group is done: its credits stay, its run goes."""
        write_tensors(self.folder / f"group-{group}.safetensors", {"tokens": tokens}, {"figures": json.dumps(figures)})
        shutil.rmtree(self.folder / f"group-{group}", ignore_errors=True)


@contextmanager
def working(folder: Path, key: Mapping[str, Any], needed: int) -> Iterator[WorkFolder]:
    """A work folder to begin or to go on with; nobody else's meanwhile.

    Args:
        folder: it need not exist.
        key: all that the scores depend on, flat, plain JSON.
        needed: bytes that it may come to take.

    Raises:
        UsageError: if it was begun with another key, is another process's or no work folder, or the disk is too small.
    """
    plain = json.loads(json.dumps(key))
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UsageError(f"{folder} is no folder.", "Remove it, or name another --out.")
    with writing(folder):
        folder.mkdir(exist_ok=True)
    with _unless_empty(folder), locked(folder):
        require_same(folder, plain)
        with writing(folder):
            there = sum(path.stat().st_size for path in folder.rglob("*"))
            free = shutil.disk_usage(folder).free
        if needed > there + free:
            raise UsageError(
                f"The states take up to {needed / 1e9:.1f} GB of disk; {folder.parent} has {(there + free) / 1e9:.1f}.",
                "Name an --out on a larger disk, or keep fewer states (--memory sqrt).",
            )
        write_json(folder / "work.json", plain)
        yield WorkFolder(folder)


def require_same(folder: Path, key: Mapping[str, Any]) -> None:
    """Refuse a folder that was begun with something else, or that holds something else.

    Raises:
        UsageError: naming what differs.
    """
    about = folder / "work.json"
    if about.is_file():
        changes = differences(_read_key(about), key)
        if changes:
            raise UsageError(
                f"{folder} was begun otherwise: {'; '.join(changes)}.",
                "Put that back to go on with it, or remove the folder to begin anew.",
            )
        return
    others = [path.name for path in folder.iterdir() if not TEMPORARY.fullmatch(path.name)]
    if others:
        raise UsageError(f"{folder} holds something else ({others[0]}).", "Name another --out.")


@contextmanager
def _unless_empty(folder: Path) -> Iterator[None]:
    """Remove the folder at the end if nothing was written there."""
    try:
        yield
    finally:
        with suppress(OSError):
            folder.rmdir()


def remove(folder: Path) -> None:
    """Remove a work folder whose scores are written."""
    with writing(folder):
        shutil.rmtree(folder)


def differences(begun: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, in words; sums of contents only by name."""
    found = []
    for name in dict.fromkeys([*begun, *now]):
        before, here = begun.get(name), now.get(name)
        if before == here or _close(before, here):
            continue
        sums = any(isinstance(value, str) and len(value) == 64 for value in (before, here))
        found.append(f"{name} is another" if sums else f"{name} is {shown(before)} there and {shown(here)} here")
    return found


def _close(before: Any, here: Any) -> bool:
    """Whether two lists of numbers are one, but for what another process rounds."""
    if not (isinstance(before, list) and isinstance(here, list) and len(before) == len(here)):
        return False
    pairs = list(zip(before, here, strict=True))
    if not all(isinstance(value, float) for pair in pairs for value in pair):
        return False
    return all(math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-9) for one, other in pairs)


def damaged(path: Path) -> UsageError:
    """The refusal of a file that is not as it was written."""
    return UsageError(f"{path} is damaged.", f"Remove {path.parent} to begin anew.")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(plain, temporary, about)


def read_tensors(path: Path, like: Tensor) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file on the device of `like`, which must be of its dtype; and what is said of them.

    Raises:
        UsageError: if it is damaged.
    """
    with reading_tensors(path), safe_open(path, "pt") as file:
        names = list(file.keys())
        # in memory of their own: what a product rounds to may depend on how its operands are aligned
        found = {name: file.get_tensor(name).clone().to(like.device) for name in names}
        if any(tensor.dtype != like.dtype for tensor in found.values()):
            raise damaged(path)
        return found, dict(file.metadata() or {})


@contextmanager
def reading_tensors(path: Path) -> Iterator[None]:
    """Say in one line that a file cannot be read."""
    try:
        yield
    except (SafetensorError, KeyError, ValueError):
        raise damaged(path) from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {os_reason(error)}.", "Check the path.") from error


def _read_key(path: Path) -> dict[str, Any]:
    try:
        with reading(path):
            return dict(json.loads(path.read_bytes()))
    except ValueError:
        raise damaged(path) from None
