"""Metagradients put beside the rows that they are of: the rows of the scores, and the extremes that are shown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from dpg_cli.attribution.scores import MANY, OF_TOKENS, SCHEMA, Scored, write_scores, write_tensors
from dpg_cli.data.prepared import Prepared
from dpg_cli.models.loading import LanguageModel


@dataclass(frozen=True)
class ScoreTable:
    """Metagradients of the rows that were trained on, with all rows of the data.

    Attributes:
        found: the rows.
        target: its tokeniser has the text of tokens.
        example_Q_N, token_Q_N_S: on the CPU.
    """

    found: Prepared
    target: LanguageModel
    example_Q_N: Tensor
    token_Q_N_S: Tensor

    def write(self, out: Path, names: list[str], record: dict[str, Any], token_scores: bool | None) -> None:
        """Write the scores, and how they were made.

        Args:
            out: where; `check_place` has passed it.
            names: of the queries.
            record: how they were made.
            token_scores: with those of tokens; None where there is one query, or they are tensors.
        """
        if out.suffix.lower() == ".safetensors":
            write_tensors(out, self._tensors(token_scores is not False), {**record, "names": names})
        elif len(names) == 1:
            write_scores(out, (row.as_row() for row in self.rows()), SCHEMA, record)
        else:
            schema = MANY if token_scores else pa.schema([field for field in MANY if field.name not in OF_TOKENS])
            write_scores(out, self._long(names, bool(token_scores)), schema, record)

    def extremes(self, query: int, top: int) -> tuple[list[Scored], list[Scored]]:
        """The examples with the highest scores, the highest first, and those with the lowest, the lowest first."""
        ranking = self.example_Q_N[query].argsort(descending=True)
        top = min(top, len(ranking))
        best, worst = ranking[:top].tolist(), ranking.flip(0)[:top].tolist()
        own = self.found.trained
        return [self._scored(own[n], n, query) for n in best], [self._scored(own[n], n, query) for n in worst]

    def rows(self) -> Iterator[Scored]:
        """All rows that are not empty; one that had nothing to train on has scores of 0."""
        return (self._scored(place, number, 0) for place, number in self._places())

    def _places(self) -> Iterator[tuple[int, int | None]]:
        """Place and number (None: nothing to train on) of each row."""
        own, number = self.found.trained, 0
        for place in range(len(self.found.rows)):
            trained = number < len(own) and own[number] == place
            yield place, number if trained else None
            number += trained

    def _long(self, names: list[str], tokens: bool) -> Iterator[dict[str, Any]]:
        for query, name in enumerate(names):
            for place, number in self._places():
                score = 0.0 if number is None else float(self.example_Q_N[query, number])
                text = self.found.rows[place].text if not query else None
                row = {"query": name, "example_id": self.found.numbers[place], "text": text, "score": score}
                if tokens:
                    words = pieces(self.target, self.found.rows[place].ids) if not query else None
                    row |= {"tokens": words, "token_scores": self._tokens(place, number, query)}
                yield row

    def _tokens(self, place: int, number: int | None, query: int) -> list[float]:
        size = len(self.found.rows[place].ids)
        return [0.0] * size if number is None else self.token_Q_N_S[query, number, :size].tolist()

    def _scored(self, place: int, number: int | None, query: int) -> Scored:
        row = self.found.rows[place]
        score = 0.0 if number is None else float(self.example_Q_N[query, number])
        texts = pieces(self.target, row.ids)
        return Scored(self.found.numbers[place], score, row, texts, self._tokens(place, number, query))

    def _tensors(self, tokens: bool) -> dict[str, Tensor]:
        """The rows that have something to train on, as tensors."""
        rows, places = self.found.rows, self.found.trained
        ids = torch.zeros(self.token_Q_N_S.shape[1:], dtype=torch.int32)
        for number, place in enumerate(places):
            own = rows.ids[rows.starts[place] : rows.starts[place + 1]]
            ids[number, : len(own)] = torch.frombuffer(own, dtype=torch.int32) if len(own) else 0
        found = {
            "scores": self.example_Q_N,
            "example_ids": torch.tensor([self.found.numbers[place] for place in places]),
            "lengths": torch.from_numpy(rows.lengths[places]),
            "token_ids": ids,
        }
        return {**found, "token_scores": self.token_Q_N_S} if tokens else found


def pieces(target: LanguageModel, ids: list[int]) -> list[str]:
    """The text of each token by itself."""
    return [target.tokenizer.decode([token]) for token in ids]
