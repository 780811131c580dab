"""Token ids that have no text: ids beyond the tokeniser, in the padding of a model's vocabulary.

Sampling never draws them now; a run of an earlier release may hold some, and its texts are then shorter than its tokens.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

COLUMN = "token_ids"


class Unspoken:
    """Counts tokens without a text in the rows that an export writes.

    Args:
        generator: a model folder; without a `tokenizer.json` nothing is counted.

    Attributes:
        tokens, rows: how many such tokens there are, and in how many rows.
    """

    def __init__(self, generator: Path) -> None:
        self.tokens = self.rows = 0
        self.known: np.ndarray | None = None
        try:
            ids = list(Tokenizer.from_file(str(generator / "tokenizer.json")).get_vocab().values())
        except Exception:  # a slow tokeniser, or a damaged file: the export itself does not need it
            return
        self.known = np.zeros(max(ids, default=-1) + 2, dtype=bool)  # the last stands for all ids beyond
        self.known[ids] = True

    def see(self, batch: pa.RecordBatch) -> None:
        """Count in some rows."""
        if self.known is None or COLUMN not in batch.schema.names or not batch.num_rows:
            return
        column = batch.column(batch.schema.get_field_index(COLUMN))
        places = np.asarray(column.value_lengths().fill_null(0))
        ids = np.asarray(column.flatten()).astype(np.int64)
        silent = ~self.known[np.where((ids < 0) | (ids >= len(self.known)), len(self.known) - 1, ids)]
        self.tokens += int(silent.sum())
        self.rows += len(np.unique(np.repeat(np.arange(batch.num_rows), places)[silent]))

    @property
    def words(self) -> str:
        """A sentence for the card and the screen; empty where every token has a text."""
        if not self.tokens:
            return ""
        return (
            f"{self.tokens:,} tokens in {self.rows:,} rows have no text: their ids lie beyond the generator's tokeniser, "
            "and the texts leave them out."
        )
