"""The weights of a folder: which safetensors files belong to it, how many parameters, where the LM head is."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpg_cli.errors import UsageError
from dpg_cli.inspection.tensors import PICKLES, Tensor, TensorFile, read_header
from dpg_cli.models.folder import pickle_remedy
from dpg_cli.runs.status import read_json

INDEX = "model.safetensors.index.json"
PATCH = "patch.safetensors"
MOST_NORMED = 500_000_000  # values; above that, only the head's norm is taken
_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
_EMBEDDINGS = (
    "wte.weight",
    "embed_tokens.weight",
    "word_embeddings.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
)


@dataclass(frozen=True)
class Weights:
    """Some safetensors files, taken together.

    Attributes:
        files: their headers.
    """

    files: tuple[TensorFile, ...]

    @property
    def parameters(self) -> int:
        """Number of values."""
        return sum(file.size for file in self.files)

    @property
    def tensors(self) -> list[tuple[TensorFile, Tensor]]:
        """All tensors with their files."""
        return [(file, tensor) for file in self.files for tensor in file.tensors.values()]

    @property
    def dtypes(self) -> dict[str, int]:
        """Number of values by type."""
        counts: Counter[str] = Counter()
        for _, tensor in self.tensors:
            counts[tensor.dtype] += tensor.size
        return dict(counts)

    def find(self, name: str) -> TensorFile | None:
        """The file that holds a tensor."""
        return next((file for file in self.files if name in file.tensors), None)

    def head(self) -> tuple[TensorFile, Tensor, bool] | None:
        """The LM head, and whether it is tied to the embedding; None where no tensor looks like one."""
        for names, tied in ((_HEADS, False), (_EMBEDDINGS, True)):
            for wanted in names:
                for file, tensor in self.tensors:
                    if "/" in tensor.name:  # a checkpoint's moments: exp_avg/lm_head.weight
                        continue
                    if (tensor.name == wanted or tensor.name.endswith(f".{wanted}")) and len(tensor.shape) == 2:
                        return file, tensor, tied
        return None

    def listing(self) -> list[dict[str, Any]]:
        """Each tensor with name, file, type, shape and norm (None where there are too many values to go through)."""
        taken = self.parameters <= MOST_NORMED
        return [
            {
                "name": tensor.name,
                "file": file.path.name,
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "parameters": tensor.size,
                "norm": norm_of(file, tensor.name) if taken else None,
            }
            for file, tensor in self.tensors
        ]

    def summary(self) -> dict[str, Any]:
        """Counts, and the head."""
        return {
            "parameters": self.parameters,
            "tensors": sum(len(file.tensors) for file in self.files),
            "dtypes": self.dtypes,
            "files": [
                {"name": file.path.name, "bytes": file.path.stat().st_size, "tensors": len(file.tensors)}
                for file in self.files
            ],
            "head": self.head_summary(),
        }

    def head_summary(self) -> dict[str, Any] | None:
        """Name, shape and norm of the LM head."""
        found = self.head()
        if found is None:
            return None
        file, tensor, tied = found
        return {
            "name": tensor.name,
            "tied": tied,
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "norm": norm_of(file, tensor.name),
        }


def norm_of(file: TensorFile, name: str) -> float | None:
    """l2 norm of a tensor; None for types that numpy lacks."""
    try:
        return file.norm(name)
    except UsageError:
        return None


def weights_of(folder: Path) -> Weights:
    """The weights of a folder that `save_pretrained` wrote, or of any folder with safetensors files.

    Raises:
        UsageError: if there are none, if they are pickles, or if the index names a file outside the folder.
    """
    index = folder / INDEX
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
            raise UsageError(f"{index} has no proper weight_map.", "Take the folder from a copy.")
        files = sorted(set(names.values()))
        for name in files:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise UsageError(
                    f"{index} names {name!r}, which is no safetensors file beside it.", "Do not use the folder."
                )
        return Weights(tuple(read_header(folder / name) for name in files))
    found = sorted(path for path in folder.glob("*.safetensors") if path.name != PATCH)
    if not found:
        pickles = sorted(path.name for path in folder.glob("*") if path.suffix.lower() in PICKLES)
        if pickles:
            raise UsageError(
                f"{folder} holds its weights as a pickle ({pickles[0]}), which is not opened: loading one can run any code.",
                pickle_remedy(folder),
            )
        raise UsageError(f"{folder} has no safetensors files.", "Name a run, a checkpoint or a model folder.")
    return Weights(tuple(read_header(path) for path in found))


def left_alone(folder: Path) -> list[str]:
    """Names of pickles and of code in a folder: what is neither opened nor run."""
    return sorted(path.name for path in folder.glob("*") if path.suffix.lower() in (*PICKLES, ".py"))
