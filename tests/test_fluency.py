"""How data reads beside its control: nats under readers, a run judged, any two datasets compared."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from builders import make_target, save_gpt2
from short_run import EXAMPLES, call, copy_of, make_run
from transformers import PreTrainedModel

from dpg_cli.data.chat import PromptFormat
from dpg_cli.engine.generator.rollout import Sampling, sample
from dpg_cli.errors import UsageError
from dpg_cli.evidence.fluency import rows as rows_module
from dpg_cli.evidence.fluency.judge import FEWEST, Fluency, at_random
from dpg_cli.evidence.fluency.nats import Cost, Sampled, compare, cost, fitted
from dpg_cli.evidence.fluency.rows import even, read_pair
from dpg_cli.evidence.fluency.run import judge_run, reader_for
from dpg_cli.evidence.stock import Watcher
from dpg_cli.models.loading import LanguageModel, load
from dpg_cli.runs.folder import RunFolder
from dpg_cli.tiny import world

CPU = torch.device("cpu")
Monkey = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run whose generator moved far, with enough rows to be told apart."""
    return make_run(tmp_path_factory.mktemp("runs") / "run", f"dataset.examples={2 * FEWEST}", "policy.lr=0.01")


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    return load("tiny", device=CPU)


def precise() -> LanguageModel:
    """A model in float64 with 29 tokens, whose tokeniser is never asked."""

    class Tokenizer:
        bos_token_id = None

    model = make_target("llama", tied=False)
    assert isinstance(model, PreTrainedModel)
    return LanguageModel(model, Tokenizer(), "precise", 0, 0, (0,))


def one_by_one(reader: LanguageModel, context: list[int], row: np.ndarray) -> float:
    """-log p of a completion, by autoregression on the model's own loss."""
    ids = torch.tensor([*context, *row.tolist()])[None]
    with torch.no_grad():
        logits = reader.model(ids).logits[0, len(context) - 1 : -1]
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(row), reduction="sum"))


def test_costs_are_the_models_own_losses(monkeypatch: Monkey) -> None:
    """Ragged contexts and completions in batches of three, against one row at a time, in float64."""
    reader, random = precise(), np.random.default_rng(0)
    contexts = [random.integers(29, size=size).tolist() for size in random.integers(0, 6, size=17)]
    rows = [random.integers(29, size=size) for size in random.integers(1, 9, size=17)]
    monkeypatch.setattr("dpg_cli.evidence.fluency.nats.ROWS_AT_ONCE", 3)
    seen: list[tuple[int, int]] = []
    found = cost(reader, contexts, rows, progress=lambda done, total: seen.append((done, total)))
    wanted = [one_by_one(reader, context or [0], row) for context, row in zip(contexts, rows, strict=True)]
    assert found.nats_N == pytest.approx(wanted, rel=1e-10)
    assert found.sampled_N == pytest.approx(wanted, rel=1e-10)
    assert found.tokens_N.tolist() == [len(row) for row in rows]
    assert found.mean == pytest.approx(sum(wanted) / sum(map(len, rows)))
    assert seen == [(3, 17), (6, 17), (9, 17), (12, 17), (15, 17), (17, 17)]
    order = random.permutation(17)
    again = cost(reader, [contexts[place] for place in order], [rows[place] for place in order])
    assert again.nats_N == pytest.approx(found.nats_N[order], rel=1e-12)


def test_the_sampling_distribution_is_the_samplers(tiny: LanguageModel) -> None:
    """Temperature, a held-back end and silent tokens, against what the sampler itself recorded."""
    silent = (3, 300)
    sampling = Sampling(
        2, 12, 6, 1.4, tiny.eos_id, tiny.pad_id, end_ids=tiny.end_ids, prompts=PromptFormat(tiny.tokenizer), silent_ids=silent
    )  # fmt: skip
    prompts = world.prompts("eval", 6, seed=1)
    rollout = sample(tiny.model, tiny.tokenizer, prompts, sampling, torch.Generator().manual_seed(0))
    contexts = PromptFormat(tiny.tokenizer).encode(rollout.prompts)
    rows = [ids[mask].numpy() for ids, mask in zip(rollout.ids_N_K, rollout.mask_N_K, strict=True)]
    found = cost(tiny, contexts, rows, Sampled(1.4, 6, tiny.end_ids, silent))
    assert found.sampled_N == pytest.approx(-rollout.logprobs_N_K.sum(1).double().numpy(), abs=1e-3)
    assert np.abs(found.sampled_N - found.nats_N).max() > 1
    assert Sampled().plain
    assert not Sampled(1.4).plain


def test_rows_beyond_the_context_are_cut() -> None:
    row = np.arange(5)
    assert fitted([1, 2, 3], row, 8) == ([1, 2, 3], row)
    context, kept = fitted([1, 2, 3], row, 6)
    assert (context, kept.tolist()) == ([3], row.tolist())
    context, kept = fitted([1, 2, 3], row, 4)
    assert (context, kept.tolist()) == ([3], [0, 1, 2])


@pytest.mark.parametrize("paired", [True, False])
def test_errors_of_a_difference_are_those_of_repeated_draws(paired: bool) -> None:
    random = np.random.default_rng(0)

    def once() -> tuple[float, float]:
        shared = random.normal(size=80) if paired else 0.0
        costs = []
        for mean in (3.1, 3.0):
            tokens = random.integers(4, 20, size=80)
            nats = mean * tokens + random.normal(size=80) * np.sqrt(tokens) + 6 * shared
            costs.append(Cost(nats, nats, tokens))
        found = compare("x", *costs, paired)
        assert found.difference == pytest.approx(found.data - found.control)
        assert found.ratio == pytest.approx(math.exp(found.difference))
        return found.difference, found.error

    found = np.array([once() for _ in range(400)])
    assert found[:, 0].mean() == pytest.approx(0.1, abs=0.01)
    assert found[:, 1].mean() == pytest.approx(found[:, 0].std(), rel=0.12)


def test_a_run_is_judged(run: Path, tiny: LanguageModel) -> None:
    folder, stages = RunFolder(run), list[str]()
    config = folder.read_config()
    found = judge_run(folder, config, CPU, None, Watcher(stages.append))
    start = load("tiny", device=CPU, init=config.models.generator_init, seed=config.models.init_seed)
    means = {}
    for name in ("train", "control"):
        data = pq.read_table(run / "dataset" / f"{name}.parquet").to_pydict()
        contexts = PromptFormat(start.tokenizer).encode(data["prompt"])
        rows = [np.array(row) for row in data["token_ids"]]
        each = [one_by_one(start, context, row) for context, row in zip(contexts, rows, strict=True)]
        means[name] = sum(each) / sum(map(len, rows))
    nats = found.nats[0]
    assert found.notes == ()
    assert (nats.data, nats.control) == pytest.approx((means["train"], means["control"]), rel=1e-5)
    assert nats.difference > 5 * nats.error > 0  # what the starting generator would seldom write
    counts, ratio = found.telling
    assert counts.example.value > 0.55
    assert ratio.example.value > max(0.6, counts.example.value)
    assert ratio.many.value > ratio.example.value
    assert found.kl is not None
    assert 0 < nats.difference < 3 * found.kl
    assert len(found.data) == len(found.control) == 5
    text = pq.read_table(run / "dataset" / "train.parquet")["text"].to_pylist()
    assert [row.text for row in found.data] == [text[row.number] for row in found.data]
    assert {row.number for row in found.data} != {row.number for row in found.control}
    lines = found.lines()
    assert lines[0] == "How it reads, from 100 examples of each"
    assert f"perplexity x {nats.ratio:.4g}" in lines[2]
    assert json.loads(json.dumps(found.as_dict()))["nats"][0]["ratio"] == nats.ratio
    assert stages[-1] == "nats a token under the trained generator"


def test_an_untrained_generator_is_its_own_control(run: Path, tmp_path: Path) -> None:
    """The control in the place of the data, and the starting generator in that of the trained one: nothing to tell."""
    place = copy_of(run, tmp_path / "copy")
    folder = RunFolder(place)
    config = folder.read_config()
    (place / "dataset" / "train.parquet").write_bytes((place / "dataset" / "control.parquet").read_bytes())
    start = load("tiny", device=CPU, init=config.models.generator_init, seed=config.models.init_seed)
    start.model.save_pretrained(folder.generator)
    found = judge_run(folder, config, CPU, None)
    assert found.nats[0].difference == found.nats[0].error == 0
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert [telling.example.value for telling in found.telling] == [0.5, 0.5]


def test_a_reader_of_another_tokeniser(run: Path, tmp_path: Path) -> None:
    save_gpt2(tmp_path / "reader")
    reader = load(str(tmp_path / "reader"), device=CPU)
    found = judge_run(RunFolder(run), RunFolder(run).read_config(), CPU, reader)
    assert [row.reader for row in found.nats] == ["starting generator", reader.name]
    data = pq.read_table(run / "dataset" / "train.parquet").to_pydict()
    rows = [np.array(row) for row in reader.tokenizer(data["text"], add_special_tokens=False)["input_ids"]]
    contexts = PromptFormat(reader.tokenizer).encode(data["prompt"])
    each = [one_by_one(reader, c or [reader.eos_id], r) for c, r in zip(contexts, rows, strict=True) if len(r)]
    assert found.nats[1].data == pytest.approx(sum(each) / sum(map(len, rows)), rel=1e-5)


def test_what_is_missing_is_said(run: Path, tmp_path: Path) -> None:
    place = copy_of(run, tmp_path / "copy")
    for name in ("train", "control"):
        path = place / "dataset" / f"{name}.parquet"
        pq.write_table(pq.read_table(path).slice(0, FEWEST - 1), path)
    (place / "generator" / "config.json").unlink()
    found = judge_run(RunFolder(place), RunFolder(place).read_config(), CPU, None)
    assert found.telling == ()
    assert found.kl is None
    assert [note.partition(":")[0] for note in found.notes] == [
        "not told apart by counts",
        "likelihood ratio not measured",
    ]
    assert len(found.nats) == 1
    config = RunFolder(place).read_config()
    moved = config.model_copy(update={"models": config.models.model_copy(update={"generator": str(tmp_path / "no")})})
    found = judge_run(RunFolder(place), moved, CPU, None)
    assert found.nats == ()
    assert "nats not measured" in found.notes[-1]


def test_the_reader_of_a_world() -> None:
    from dpg_cli.settings.presets import find, resolve

    config = resolve(find("qr-embed.tiny").data(), [])
    assert reader_for(config, "auto") == reader_for(config, "none") == ""
    assert reader_for(config, "some-model") == "some-model"
    prose = config.model_copy(update={"models": config.models.model_copy(update={"generator": "prose"})})
    assert reader_for(prose, "auto") == "prose-reader"
    assert reader_for(prose, "none") == ""


def save_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    return str(path)


def test_rows_of_any_kind_of_file(tmp_path: Path, tiny: LanguageModel, monkeypatch: Monkey) -> None:
    rows = [{"token_ids": [1, number], "prompt": f"p{number}", "text": f"t {number}"} for number in range(20)]
    one, other = save_rows(tmp_path / "a.parquet", rows), save_rows(tmp_path / "b.jsonl", rows)
    for first, second in ((one, other), (other, one)):
        sides = read_pair(first, second)
        for side in sides:
            assert [row.tolist() for row in side.tokens] == [row["token_ids"] for row in rows]
            assert side.prompts == [row["prompt"] for row in rows]
            assert side.texts == [row["text"] for row in rows]
            assert (side.rows, side.numbers) == (20, list(range(20)))
    with monkeypatch.context() as patch:
        patch.setattr(rows_module, "MOST_ROWS", 8)
        assert read_pair(one, other)[1].numbers == even(20, 8) == [0, 2, 5, 7, 10, 12, 15, 17]
        patch.setattr(rows_module, "MOST_TOKENS", 8)
        assert read_pair(one, other)[0].numbers == [0, 5, 10, 15]

    def tokenize(texts: list[str]) -> list[list[int]]:
        return tiny.tokenizer(texts, add_special_tokens=False)["input_ids"]

    chat = [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "the house"}]}] * 3
    third = save_rows(tmp_path / "c.jsonl", chat)
    sides = read_pair(third, one, tokenize)
    assert sides[0].texts == ["the house"] * 3
    assert sides[0].prompts is None
    assert sides[0].tokens[0].tolist() == tokenize(["the house"])[0]
    named = read_pair(f"{one}:prompt", f"{other}:prompt", tokenize)
    assert named[0].texts[2] == "p2"


@pytest.mark.parametrize(("rows", "said"), [
    ([{"text": "a"}], "has no column 'token_ids' or 'input_ids'; it has text. Give --tokenizer MODEL"),
    ([{"x": "a"}], "has no column 'token_ids' or 'input_ids'; it has x. Name a column"),
    ([{"token_ids": [1]}, {"token_ids": ["a"]}], "line 2: 'token_ids' holds no token ids"),
    ([{"token_ids": [1]}, {"token_ids": [-1]}], "line 2: 'token_ids' holds no token ids"),
    ([{"token_ids": [1]}, {"token_ids": [2**40]}], "line 2: 'token_ids' holds no token ids"),
    ([{"token_ids": []}], "has no tokens to compare"),
    ([{"input_ids": [1]}], "no column of token ids in common"),
])  # fmt: skip
def test_what_cannot_be_compared_is_one_line(rows: list[dict[str, Any]], said: str, tmp_path: Path) -> None:
    good = save_rows(tmp_path / "good.jsonl", [{"token_ids": [1, 2]}])
    with pytest.raises(UsageError) as caught:
        read_pair(save_rows(tmp_path / "bad.jsonl", rows), good)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]\n", b"\xff\xfe\x00", b"PAR1 not at all"])
@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet"])
def test_damaged_files_are_one_line(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    good = save_rows(tmp_path / "good.jsonl", [{"token_ids": [1, 2]}])
    with pytest.raises(UsageError):
        read_pair(good, str(tmp_path / name))


def test_any_two_datasets_at_the_command_line(run: Path, tmp_path: Path, capsys: Capture, monkeypatch: Monkey) -> None:
    """A run against its control; files of texts with a tokeniser and a reader; what is refused."""
    own = json.loads(call(capsys, monkeypatch, "inspect", "dataset", run, "--json").out)
    judged = judge_run(RunFolder(run), RunFolder(run).read_config(), CPU, None)
    assert own["telling"][0]["example"]["value"] == judged.telling[0].example.value
    one = save_rows(tmp_path / "a.jsonl", [{"text": text} for text in world.sentences("train", "en", 80, 0)])
    other = save_rows(tmp_path / "b.jsonl", [{"text": text} for text in world.sentences("train", "es", 80, 0)])
    answer = call(capsys, monkeypatch, "inspect", "dataset", one, other, "--tokenizer", "tiny", "--reader", "tiny")
    assert answer.code == 0
    assert "from 80 examples of each" in answer.out
    assert "token and bigram counts: 1.000 ± 0.000" in answer.out
    assert "tiny:" in answer.out
    same = call(capsys, monkeypatch, "inspect", "dataset", run, run)
    assert "0.500 ± 0.000" in same.out
    for arguments, said in (
        (["dataset", one, other], "--tokenizer"),
        (["dataset", one], "two are compared"),
        (["dataset", one, other, one], "two are compared"),
        (["dataset", one, other, "--render", "x.png"], "no weights to draw"),
        ([one, other], "dpg inspect dataset A B"),
        ([str(run), "--reader", "tiny"], "for datasets"),
    ):
        answer = call(capsys, monkeypatch, "inspect", *arguments)
        assert (answer.code, answer.out) == (2, "")
        assert said in answer.err


def test_verify_says_how_it_reads(run: Path, tmp_path: Path, capsys: Capture, monkeypatch: Monkey) -> None:
    place = copy_of(run, tmp_path / "copy")
    answer = call(capsys, monkeypatch, "verify", place, "--reader", "tiny", "--trainer", "plain", "--json")
    details = json.loads(answer.out)
    assert answer.code == 4
    assert [row["reader"] for row in details["fluency"]["nats"]] == ["starting generator", "tiny"]
    kept = json.loads((place / "verify.json").read_text())
    assert kept["details"]["fluency"] == details["fluency"]
    assert any("told apart" in line for line in kept["lines"])
    without = json.loads(call(capsys, monkeypatch, "verify", place, "--no-fluency", "--trainer", "plain", "--json").out)
    assert "fluency" not in without
    assert without["data"] == details["data"]
    wrong = call(capsys, monkeypatch, "verify", place, "--reader", tmp_path / "nowhere")
    assert (wrong.code, wrong.out) == (2, "")


def test_words_for_large_and_small() -> None:
    found = Fluency((32_768, 100), notes=("a note",))
    assert found.lines("A", "B") == ["How it reads, from 32,768 and 100 examples of each", "a note"]
    assert at_random(3, "data") == [0, 1, 2]
    assert at_random(EXAMPLES, "data") == at_random(EXAMPLES, "data") != at_random(EXAMPLES, "control")
