"""Data of certain characters alone, that still moves what the target says: the alphabet of rollouts, forbidden words, the preset."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from builders import save_instruct_llama
from test_paper_presets import dpg

from dpg_cli.artefacts.dataset import without
from dpg_cli.artefacts.rows import SCHEMA
from dpg_cli.engine.generator.alphabet import restricted, spelt
from dpg_cli.engine.generator.policy import PolicySpec
from dpg_cli.engine.generator.rollout import Sampling, sample
from dpg_cli.errors import ConfigError, DegenerateError, UsageError
from dpg_cli.evidence.screen import Screened, screen
from dpg_cli.models.loading import LanguageModel, load
from dpg_cli.settings.config import Config
from dpg_cli.settings.presets import find, resolve

DIGITS = "0123456789, "


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    return load("tiny", device=torch.device("cpu"))


def drawn(generator: LanguageModel, rows: int = 64, tokens: int = 12) -> Any:
    sampling = Sampling(
        1,
        tokens,
        4,
        1.0,
        generator.eos_id,
        generator.pad_id,
        end_ids=generator.end_ids,
        silent_ids=generator.silent_ids,
    )
    return sample(
        generator.model, generator.tokenizer, ["the old cat"] * rows, sampling, torch.Generator().manual_seed(1)
    )


def test_only_tokens_of_the_alphabet_are_drawn_with_their_own_distribution(tiny: LanguageModel) -> None:
    """π is the softmax over the allowed tokens alone: what is recorded, and what the policy step reads."""
    generator = restricted(tiny, DIGITS)
    allowed = spelt(tiny, DIGITS)
    texts = {tiny.tokenizer.decode([number]) for number in allowed}
    assert texts == set(DIGITS)
    assert restricted(tiny, "") is tiny
    rollout = drawn(generator)
    ids = set(rollout.ids_N_K[rollout.mask_N_K].tolist())
    assert ids <= allowed | {tiny.eos_id}
    assert len(ids) > 6
    with torch.no_grad():
        logits = tiny.model(rollout.prompt_ids_N_Q[:1]).logits[0, -1].double()
    own = sorted(allowed)  # an end is held back at the first token
    by_hand = dict(zip(own, torch.log_softmax(logits[own], -1).tolist(), strict=True))
    for token, logprob in zip(rollout.ids_N_K[:, 0].tolist(), rollout.logprobs_N_K[:, 0].tolist(), strict=True):
        assert logprob == pytest.approx(by_hand[token], abs=1e-5)
    log_pi = PolicySpec(silent_ids=generator.silent_ids).log_pi(logits)
    others = [number for number in range(len(logits)) if number not in allowed | {tiny.eos_id}]
    assert float(log_pi[others].exp().sum()) == 0
    assert float(log_pi.exp().sum()) == pytest.approx(1, abs=1e-9)


def test_a_tokeniser_that_drops_blanks_is_read_inside_a_text(tmp_path: Path) -> None:
    save_instruct_llama(tmp_path / "llama")
    model = load(str(tmp_path / "llama"), device=torch.device("cpu"))
    found = {text for number in spelt(model, "0123456789, ") if (text := model.tokenizer.decode([number]))}
    assert found
    assert all(set(text) <= set(DIGITS) for text in found)
    assert not spelt(model, "0123456789") & set(model.end_ids)
    with pytest.raises(UsageError, match="No token of the generator"):
        restricted(model, "\u2603")


def test_examples_with_a_forbidden_word_are_left_out(tiny: LanguageModel) -> None:
    rollout = drawn(tiny, tokens=10)
    texts = tiny.tokenizer.batch_decode(
        [row[mask].tolist() for row, mask in zip(rollout.ids_N_K, rollout.mask_N_K, strict=True)],
        skip_special_tokens=True,
    )
    word = texts[0].split()[0].upper()
    kept = list(without(iter([rollout, rollout]), tiny, (word,)))
    expected = [number for number, text in enumerate(texts) if word.casefold() not in text.casefold()]
    assert 0 < len(expected) < len(texts)
    assert [len(part) for part in kept] == [len(expected)] * 2
    assert torch.equal(kept[1].ids_N_K, rollout.rows(torch.tensor(expected)).ids_N_K)
    assert list(without(iter([rollout]), tiny, ())) == [rollout]
    with pytest.raises(DegenerateError, match="Every example holds a word"):
        list(without(iter([rollout.rows(torch.tensor([0]))]), tiny, (word,)))


class Effect:
    """A verdict that is always right."""

    verified, reason = True, ""

    def as_dict(self) -> dict[str, Any]:
        return {"verified": True, "gap": 1.0}

    def lines(self) -> list[str]:
        return ["an effect"]


def files(folder: Path, train: list[str], control: list[str]) -> Path:
    folder.mkdir()
    for name, texts in (("train", train), ("control", control)):
        empty: list[Any] = [None] * len(texts)
        columns = {"example_id": range(len(texts)), "text": texts, "prompt": [""] * len(texts)}
        table = pa.table({field.name: columns.get(field.name, empty) for field in SCHEMA}, schema=SCHEMA)
        pq.write_table(table, folder / f"{name}.parquet")
    return folder


def settings(*more: str) -> Config:
    return resolve(find("subliminal-trait.tiny").data(), [*more, "dataset.examples=4"])


def test_the_screen_reads_the_texts_themselves(tmp_path: Path) -> None:
    """A word in any case and inside another, and a strange character, each in either file, cost the verdict."""
    clean = ["1, 2", "34 5", "6", "78"]
    cases: dict[str, tuple[list[str], list[str], str]] = {
        "clean": (clean, clean, ""),
        "word": ([*clean[:3], "1 PUND"], clean, "1 rows of dataset/train.parquet hold 'und'"),
        "control": (clean, ["7 und", "8 und"], "2 rows of dataset/control.parquet hold 'und'"),
        "character": ([*clean, "1x"], clean, "1 rows of dataset/train.parquet have characters outside"),
    }
    for name, (train, control, reason) in cases.items():
        found = screen(files(tmp_path / name, train, control), settings())
        assert found is not None
        verdict = Screened(Effect(), found)
        assert (verdict.verified, found.reason[: len(reason)]) == (not reason, reason), name
        assert verdict.as_dict()["screen"]["clean"] is (not reason)
        json.dumps(verdict.as_dict())
    assert found.dropped == {"train.parquet": -1, "control.parquet": 0}
    fewer = screen(files(tmp_path / "fewer", clean[:3], clean), settings())
    assert fewer is not None
    assert fewer.dropped == {"train.parquet": 1, "control.parquet": 0}
    assert "1 drawn ones were left out" in fewer.lines()[0]
    bare = settings("rollout.alphabet=''", "dataset.forbidden=[]")
    assert screen(tmp_path / "clean", bare) is None


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["inner.labels='soft'"], "rollout.alphabet: inner.labels = 'soft' reads the whole vocabulary"),
        (["policy.step='natural'", "policy.kl=0"], "rollout.alphabet: policy.step = 'natural' reads"),
        (
            ["trainer='trl'", "credit.mode='sequence'", "rollout.group_size=2"],
            "rollout.alphabet: trainer = 'trl' reads",
        ),
        (["dataset.forbidden=['a', ' ']"], "dataset.forbidden: has an empty word"),
    ],
)
def test_what_cannot_be_is_refused(more: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        settings(*more)


def test_the_preset_through_the_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two outer steps of numbers: files, card and verdict; so few steps are no effect, and the screen says what it read."""
    small = ["steps=2", "prompts.per_step=16", "inner.batch_size=16", "dataset.examples=32", "policy.minibatch=16"]
    sets = [part for text in small for part in ("--set", text)]
    run = tmp_path / "run"
    code, _, said = dpg(capsys, monkeypatch, "run", "subliminal-trait", "--out", run, *sets)
    assert code == 0, said
    for name in ("train", "control"):
        texts = pq.read_table(run / "dataset" / f"{name}.parquet")["text"].to_pylist()
        assert len(texts) == 32
        assert all(text and set(text) <= set(DIGITS) for text in texts)
    code, out, _ = dpg(capsys, monkeypatch, "verify", run, "--json")
    verdict = json.loads(out)
    assert code in (0, 4)
    assert verdict["screen"]["clean"] is True
    assert verdict["screen"]["rows"] == {"train.parquet": 32, "control.parquet": 32}
    assert {"accuracy", "margin"} <= verdict["before"].keys()
    code, out, said = dpg(capsys, monkeypatch, "export", "dataset", run, "--out", tmp_path / "more.jsonl", "--n", "8")
    assert code == 0, said
    rows = [json.loads(line) for line in (tmp_path / "more.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert all(set(row["text"]) <= set(DIGITS) for row in rows)


def test_an_unsaid_token_is_silent(tiny: LanguageModel) -> None:
    assert replace(tiny, unsaid=(3, 5)).silent_ids == (3, 5)
