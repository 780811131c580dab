"""Stock fine-tuning: gradient accumulation is exact, rows come from parquet as they are."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from dpg_cli.errors import UsageError
from dpg_cli.evidence import stock
from dpg_cli.evidence.stock import fine_tune, read_input_ids, rows_at_once
from dpg_cli.settings.config import InnerConfig

VOCABULARY = 23


def model(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    return GPT2LMHeadModel(config).double().eval()


def sequences(count: int, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(VOCABULARY, size=size).astype(np.int32) for size in random.integers(1, 12, size=count)]


@pytest.mark.parametrize("inner", [
    InnerConfig(lr=1e-2, eps=1e-3, weight_decay=0.1),
    InnerConfig(lr=1e-2, normalization="example"),
    InnerConfig(optimizer="sgd", lr=1e-1, momentum=0.9, normalization="example", max_length=14),
], ids=["token", "example", "sgd"])  # fmt: skip
@pytest.mark.parametrize("steps", [1, 3])
def test_micro_batches_change_nothing(inner: InnerConfig, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step in micro-batches of 3 rows is the step on the whole batch: same normaliser, rounding of float64."""
    start, rows = model(), sequences(20)
    whole, parts = copy.deepcopy(start), copy.deepcopy(start)
    assert fine_tune(whole, rows, inner, steps) == steps
    monkeypatch.setattr(stock, "ROWS_AT_ONCE", 3)
    seen: list[tuple[int, int]] = []
    assert fine_tune(parts, rows, inner, steps, lambda done, total: seen.append((done, total))) == steps
    for name, value in whole.named_parameters():
        assert torch.allclose(parts.get_parameter(name), value, rtol=1e-9, atol=1e-12), name
    assert not torch.allclose(start.lm_head.weight, whole.lm_head.weight, rtol=1e-3, atol=0)
    assert [done for done, _ in seen] == ([3, 6, 9, 12, 15, 18, 20] if steps == 1 else [3, 6, 7, 10, 13, 14, 17, 20])
    assert {total for _, total in seen} == {20}


def test_the_loss_is_the_mean_over_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """One SGD step against autograd on every row by itself."""
    start, rows = model(), sequences(7)
    losses = [
        torch.nn.functional.cross_entropy(
            start(torch.tensor(row)[None].long()).logits[0, :-1], torch.tensor(row[1:]).long(), reduction="sum"
        )
        for row in rows
        if len(row) > 1
    ]
    loss = torch.stack(losses).sum() / sum(len(row) - 1 for row in rows)
    gradient = torch.autograd.grad(loss, start.lm_head.weight)[0]
    trained = copy.deepcopy(start)
    monkeypatch.setattr(stock, "ROWS_AT_ONCE", 2)
    fine_tune(trained, rows, InnerConfig(optimizer="sgd", lr=0.5), 1)
    assert torch.allclose(trained.lm_head.weight, start.lm_head.weight - 0.5 * gradient, rtol=1e-9, atol=1e-14)


def test_rows_of_a_large_vocabulary_come_few_at_once() -> None:
    small = model()
    assert rows_at_once(small, 32) == stock.ROWS_AT_ONCE
    small.lm_head.weight = torch.nn.Parameter(torch.empty(1024, 0))
    assert rows_at_once(small, 33) == 124  # 124 · 33 · 1,024 numbers are 16 MB
    small.lm_head.weight = torch.nn.Parameter(torch.empty(50_257, 0))
    assert rows_at_once(small, 128) == 1
    small.lm_head.weight = torch.nn.Parameter(torch.empty(50_257, 0, device="meta"))
    assert rows_at_once(small, 128) == 10  # 257 MB
    assert rows_at_once(small, 10**7) == 1


def test_input_ids_are_read_row_by_row(tmp_path: Path) -> None:
    rows = [[1, 2, 3], [], [4], *([number] * (number % 5) for number in range(200))]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"input_ids": pa.array(rows, pa.list_(pa.int32()))}), path, row_group_size=7)
    found = read_input_ids(path)
    assert [row.tolist() for row in found] == rows
    assert {row.dtype for row in found} == {np.dtype(np.int32)}


@pytest.mark.parametrize("column", [
    {"text": ["a"]}, {"input_ids": ["a"]}, {"input_ids": [[1, None]]}, {"input_ids": [[1], None]},
], ids=["none", "text", "hole", "missing row"])  # fmt: skip
def test_no_dataset_is_one_line(column: dict[str, list[object]], tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table(column), path)
    with pytest.raises(UsageError, match="is no readable dataset"):
        read_input_ids(path)
