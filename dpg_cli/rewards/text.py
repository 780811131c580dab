"""Rewards of a text: closeness to held-out texts by edit distance or embedding, and language identification.

Each is a callable from N texts to N rewards, larger is better. Libraries that only these need are optional extras.
Source: paper, baselines of the language experiment.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpg_cli.errors import UsageError
from dpg_cli.metrics.registry import held_out
from dpg_cli.settings.config import Config
from dpg_cli.tiny import world

TextReward = Callable[[list[str]], Tensor]


def build_text_reward(config: Config, device: torch.device) -> TextReward | None:
    """The reward that the settings name; None where the method needs none.

    Args:
        config: the settings.
        device: where rewards (and an embedding model) live.

    Raises:
        UsageError: if a library is missing, or the embedding model is not there.
    """
    method = config.attribution.method
    if method == "language-id":
        return LanguageId(config.attribution.language or getattr(config.metric, "language", ""), device)
    if method not in ("edit-distance", "embedding"):
        return None
    texts = held_out(config.metric)[0][: config.attribution.documents]  # type: ignore[arg-type]
    if method == "edit-distance":
        return EditDistance(texts, device)
    return Embedding(texts, config.attribution.embedding_model, device)


def require(module: str, method: str, extra: str) -> Any:
    """Import a library of an optional extra.

    Raises:
        UsageError: if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0].replace("_", "-")
        raise UsageError(
            f"attribution.method = {method!r} needs {package}, which is not installed.",
            f"pip install 'dpg-cli[{extra}]'",
        ) from None


class EditDistance:
    """Minus the mean normalised Levenshtein distance to the held-out texts: from -1 (nothing in common) to 0.

    Args:
        texts: held-out texts.
        device: where rewards live.
    """

    def __init__(self, texts: list[str], device: torch.device) -> None:
        self.texts = texts
        self.device = device
        self.process = require("rapidfuzz.process", "edit-distance", "text-rewards")
        self.scorer = require("rapidfuzz.distance", "edit-distance", "text-rewards").Levenshtein.normalized_distance

    def __call__(self, texts: list[str]) -> Tensor:
        """Rewards, (N,)."""
        distances = self.process.cdist(texts, self.texts, scorer=self.scorer)
        return -torch.from_numpy(distances).double().mean(1).to(self.device)


class LanguageId:
    """log p(language | text) by py3langid, among the languages of the embedded world.

    The classifier's scores are divided by the root of the text's length in bytes, as the library does for its
    probabilities; the logarithm is taken here, where it cannot underflow.

    Args:
        language: the asked language.
        device: where rewards live.
    """

    def __init__(self, language: str, device: torch.device) -> None:
        langid = require("py3langid.langid", "language-id", "text-rewards")
        self.language = language
        self.device = device
        self.identifier = langid.LanguageIdentifier.from_model_file(
            langid.MODEL_FILE
        )  # our own: the library's is global
        self.identifier.set_languages(list(world.LANGUAGES))

    def __call__(self, texts: list[str]) -> Tensor:
        """Rewards, (N,)."""
        return torch.tensor([self._log_probability(text) for text in texts], dtype=torch.float64, device=self.device)

    def _log_probability(self, text: str) -> float:
        """Of one text; uniform where it has no feature of any language."""
        scores = dict(self.identifier.rank(text))
        highest = max(scores.values())
        scale = math.sqrt(len(text.encode("utf-8", "surrogatepass")) or 1)
        values = {name: (score - highest) / scale for name, score in scores.items()}
        return values[self.language] - math.log(sum(math.exp(value) for value in values.values()))


class Embedding:
    """Mean cosine similarity to the held-out texts in a sentence-embedding model.

    Args:
        texts: held-out texts.
        name: a folder or hub name that sentence-transformers loads; safetensors only, no remote code.
        device: where the model and the rewards live.

    Raises:
        UsageError: if it cannot be loaded.
    """

    def __init__(self, texts: list[str], name: str, device: torch.device) -> None:
        library = require("sentence_transformers", "embedding", "embedding")
        place = Path(name).expanduser()
        try:
            self.model = library.SentenceTransformer(
                str(place) if place.is_dir() else name,
                device=str(device),
                trust_remote_code=False,
                model_kwargs={"use_safetensors": True},
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UsageError(
                f"The embedding model {name!r} cannot be loaded: {reason.strip().rstrip('.')[:300]}.",
                "Name a sentence-transformers folder, or a hub model that this machine can reach.",
            ) from None
        self.device = device
        self.centre_D = self._embed(texts).mean(0)

    def _embed(self, texts: list[str]) -> Tensor:
        """Unit vectors, (N, D)."""
        vectors = self.model.encode(texts, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False)
        return vectors.double().to(self.device)

    def __call__(self, texts: list[str]) -> Tensor:
        """Rewards, (N,): the mean of cosines is the product with the mean unit vector."""
        return self._embed(texts) @ self.centre_D
