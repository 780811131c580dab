"""`dpg attribute`: the engine by itself on a user's own data, its memory plan, and the bounded text loss."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from builders import HeldOutLoss, make_examples, make_target, save_instruct_llama
from typer.testing import CliRunner

from dpg_cli.cli.app import app
from dpg_cli.engine.inner import head as head_module
from dpg_cli.errors import UsageError
from dpg_cli.metrics import text_loss
from dpg_cli.metrics.text_loss import TextLossMetric
from dpg_cli.planning import memory
from dpg_cli.planning.memory import Need, check_memory
from dpg_cli.tiny import world

BLANK = ("--set", "models.target_init=random")


def write_data(path: Path, each: int) -> list[str]:
    """As many English as Spanish sentences; returns the language of each line."""
    rows = [
        {"text": text, "language": language}
        for language, seed in (("en", 5), ("es", 6))
        for text in world.sentences("train", language, each, seed=seed)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [row["language"] for row in rows]


def area_under_curve(scores: np.ndarray, positive: np.ndarray) -> float:
    return float((scores[positive][:, None] > scores[~positive][None]).mean())


def test_ranks_a_punished_language_last(tmp_path: Path) -> None:
    data, out = tmp_path / "data.jsonl", tmp_path / "scores.parquet"
    english = np.array([language == "en" for language in write_data(data, 200)])
    answer = CliRunner().invoke(
        app, ["attribute", str(data), "--language", "en", *BLANK, "--set", "metric.documents=64", "--out", str(out), "--json"]
    )  # fmt: skip
    assert answer.exit_code == 0, answer.output
    report = json.loads(answer.stdout)
    assert (report["examples"], report["inner_steps"]) == (400, 13)
    assert report["value"] > report["value_before"] + 0.1
    table = pq.read_table(out).to_pydict()
    scores = np.array(table["score"])
    assert area_under_curve(scores, english) >= 0.99
    assert table["example_id"] == list(range(400))
    sums = np.array([sum(row) for row in table["token_scores"]])
    assert np.abs(sums - scores).max() < 1e-5 * np.abs(scores).max()
    for text, tokens, values in zip(table["text"], table["tokens"], table["token_scores"], strict=True):
        assert len(tokens) == len(values)
        assert values[0] == 0  # the beginning-of-sequence token has no loss
        assert text.split()[0] in "".join(tokens)
    order = np.argsort(-scores)
    assert [row["example_id"] for row in report["helpful"]] == order[:5].tolist()
    assert [row["example_id"] for row in report["harmful"]] == order[::-1][:5].tolist()


def test_choices_of_memory_and_order_agree(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    write_data(data, 20)
    found = {}
    for name, flags in {
        "keep": [],
        "sqrt": ["--memory", "sqrt", "--micro-batch", "3"],
        "offload": ["--memory", "offload"],
    }.items():
        out = tmp_path / f"{name}.parquet"
        arguments = ["attribute", str(data), "--language", "es", "--set", "inner.batch_size=8", "--out", str(out)]
        answer = CliRunner().invoke(app, [*arguments, "--set", "metric.documents=8", *flags])
        assert answer.exit_code == 0, answer.output
        assert "Most harmful" in answer.stdout
        found[name] = np.array(pq.read_table(out)["score"])
    assert np.abs(found["keep"]).max() > 0
    for name in ("sqrt", "offload"):
        assert np.abs(found[name] - found["keep"]).max() < 1e-4 * np.abs(found["keep"]).max()


def test_context_is_not_trained_on(tmp_path: Path) -> None:
    data, out = tmp_path / "sft.jsonl", tmp_path / "scores.parquet"
    sentences = world.sentences("train", "en", 12, seed=3)
    rows = [{"prompt": "one day " * (n % 3), "completion": text} for n, text in enumerate(sentences)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    answer = CliRunner().invoke(
        app, ["attribute", f"{data}:completion", "--prompts", f"{data}:prompt", "--language", "en", "--out", str(out)]
    )
    assert answer.exit_code == 0, answer.output
    table = pq.read_table(out).to_pydict()
    for number, values in enumerate(table["token_scores"]):
        assert (np.array(values) == 0).sum() >= 1 + 2 * (number % 3)
        assert values[-1] != 0
    assert table["text"] == sentences


def test_conversations_go_through_the_chat_template(tmp_path: Path) -> None:
    target, out = tmp_path / "target", tmp_path / "scores.parquet"
    save_instruct_llama(target)
    sentences = world.sentences("train", "en", 6, seed=3)
    chats = [[{"role": "user", "content": "hello there"}, {"role": "assistant", "content": text}] for text in sentences]
    data, table = tmp_path / "chats.jsonl", tmp_path / "chats.parquet"
    data.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    pq.write_table(pa.table({"messages": chats}), table)
    arguments = [
        "--target",
        str(target),
        "--language",
        "en",
        "--set",
        "metric.documents=4",
        "--out",
        str(out),
        "--overwrite",
    ]
    found = []
    for source in (f"{data}:messages", str(data), str(table)):
        answer = CliRunner().invoke(app, ["attribute", source, *arguments])
        assert answer.exit_code == 0, answer.output
        found.append(pq.read_table(out).to_pydict())
    assert found[0] == found[1] == found[2]
    for text, answer, tokens, scores in zip(
        sentences, found[0]["text"], found[0]["tokens"], found[0]["token_scores"], strict=True
    ):
        assert answer == text + "<|eot|>"
        assert tokens[0] == "<|begin|>" or "start" in "".join(tokens[:2])
        trained = "".join(token for token, score in zip(tokens, scores, strict=True) if score != 0)
        assert trained == answer  # the prompt and the template's frame carry no loss
    chats[2].pop()
    data.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    for extra, words in (([], "line 3: there is no turn of the assistant"), (["--target", "tiny"], "no chat template")):
        answer = CliRunner().invoke(app, ["attribute", str(data), *arguments, *extra])
        assert isinstance(answer.exception, UsageError)
        assert words in str(answer.exception)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["nowhere.txt", "--language", "en"], "nowhere.txt"),
        (["{data}"], "--eval-text"),
        (["{data}", "--language", "xx"], "metric.language"),
        (["{data}", "--metric", "text-los"], "Did you mean text-loss?"),
        (["{data}", "--language", "en", "--memory", "cloud"], "inner.states"),
        (["{data}", "--language", "en", "--out", "no/such/folder/x.parquet"], "--out"),
        (["{data}", "--language", "en", "--prompts", "{other}"], "the first doubtful pair is {data}, line 2 against"),
    ],
)
def test_bad_input_is_refused_in_one_line(tmp_path: Path, flags: list[str], words: str) -> None:
    from dpg_cli.errors import DpgError

    data, other = tmp_path / "data.jsonl", tmp_path / "other.txt"
    write_data(data, 2)
    other.write_text("one\n", encoding="utf-8")
    arguments = [flag.format(data=data, other=other) for flag in flags]
    answer = CliRunner().invoke(app, ["attribute", "--out", str(tmp_path / "x.parquet"), *arguments])
    assert isinstance(answer.exception, DpgError)
    assert words.format(data=data) in str(answer.exception)
    assert not (tmp_path / "x.parquet").exists()


@pytest.mark.parametrize("tokens", [9, 18, 8192])
@pytest.mark.parametrize("tied", [True, False])
def test_text_loss_in_pieces_equals_the_plain_one(tied: bool, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_loss, "TOKENS", tokens)
    monkeypatch.setattr(head_module, "CHUNK", 29 * 5)
    model, documents = make_target("llama", tied=tied), make_examples(7, seed=4)
    leaves = {name: value.detach().requires_grad_() for name, value in model.named_parameters()}
    plain, mine = (
        torch.autograd.grad(value, list(leaves.values()))
        for value in (HeldOutLoss(documents)(leaves, model), TextLossMetric(model, documents, "")(leaves, model))
    )
    assert (
        abs(
            float(
                (HeldOutLoss(documents)(leaves, model) - TextLossMetric(model, documents, "")(leaves, model)).detach()
            )
        )
        < 1e-12
    )
    for theirs, ours in zip(plain, mine, strict=True):
        assert float((theirs - ours).norm() / theirs.norm()) < 1e-11


@pytest.mark.parametrize("tokens", [text_loss.TOKENS, 1])
def test_a_text_loss_refuses_a_second_reverse(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradients are scaled in place, so that a second one would be wrong."""
    monkeypatch.setattr(text_loss, "TOKENS", tokens)
    model = make_target("gpt2", tied=False)
    value = TextLossMetric(model, make_examples(4), "")(dict(model.named_parameters()), model)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_memory_plan_grows_with_steps_as_it_should_and_refuses_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    need = Need(10**8, 4, 256, "keep", 8, 128, 12, 768, 12, 50257, 8)
    kept, root, disk = (replace(need, states=states).bytes for states in ("keep", "sqrt", "offload"))
    assert kept > 8 * root > 8 * disk
    assert replace(need, steps=1, states="sqrt").vectors == replace(need, steps=1).vectors == 5
    device = torch.device("cpu")
    for limit, words in (
        (kept + 1e9, None),
        (root + 1e9, "--memory sqrt takes"),
        (disk + 1e9, "--memory offload takes"),
        (1e9, "smaller target"),
    ):
        monkeypatch.setattr(memory, "machine_bytes", lambda device, limit=limit: limit)
        if words is None:
            check_memory(need, device, states_flag="--memory ", rows_flag="--micro-batch ")
            continue
        with pytest.raises(UsageError, match=words):
            check_memory(need, device, states_flag="--memory ", rows_flag="--micro-batch ")
