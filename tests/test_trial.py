"""The dry run and `dpg check` try out the smallest piece of a run, so that "fine" is true."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import END, ROWS, make, saved
from short_run import call
from zoo.tiny import tiny_model

from dpg_cli.driver.build import Built, build
from dpg_cli.driver.trial import RandomDirection, try_out
from dpg_cli.errors import UsageError
from dpg_cli.runs.folder import RunFolder
from dpg_cli.runs.sessions import Journal
from dpg_cli.settings.presets import find, resolve


def built(preset: str = "l2-shrink.tiny", *settings: str) -> Built:
    return build(resolve(find(preset).data(), ["prompts.source=empty", "prompts.per_step=2", *settings]))


@pytest.mark.parametrize(
    "settings", [("credit.mode=expected",), ("credit.mode=token", "rollout.portable=true"), ("inner.optimizer=sgd",)]
)
def test_a_trial_leaves_everything_as_it_was(settings: tuple[str, ...]) -> None:
    made = built("l2-shrink.tiny", *settings)
    models = made.players.generator.model, made.players.target.model
    before = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in models]
    states = torch.get_rng_state(), made.players.rng.get_state(), made.players.order_rng.get_state()
    try_out(made)
    for model, old in zip(models, before, strict=True):
        assert all(torch.equal(tensor, old[name]) for name, tensor in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not model.training
    now = torch.get_rng_state(), made.players.rng.get_state(), made.players.order_rng.get_state()
    assert all(torch.equal(a, b) for a, b in zip(states, now, strict=True))
    assert not made.players.policy_optimizer.state


def test_every_weight_takes_part_in_the_trials_metric() -> None:
    model = make("gpt2")
    leaves = dict(model.named_parameters())
    gradients = torch.autograd.grad(RandomDirection()(leaves, model), list(leaves.values()))
    assert all(float(gradient.abs().min()) > 0 for gradient in gradients)
    total = sum(float(gradient.double().square().sum()) for gradient in gradients)
    assert total == pytest.approx(1.0, rel=0.05)


class OneWay(torch.autograd.Function):
    """A custom function whose backward pass cannot be differentiated."""

    @staticmethod
    def forward(context: Any, value: torch.Tensor) -> torch.Tensor:
        return value * 1.0

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no way back\nsecond line")


def test_a_model_that_cannot_be_trained_or_attributed_is_one_line(tmp_path: Path) -> None:
    """Whatever a class raises deep inside: sampling, a backward pass, the second-order pass."""
    folder = saved(make("llama"), tmp_path / "model")
    for role, words in (("generator", "cannot be trained by a policy gradient"), ("target", "cannot be attributed")):
        made = built("l2-shrink.tiny", f'models.{role}="{folder}"', "credit.mode=token")
        model = getattr(made.players, role).model
        inside = model.model.layers[0].mlp.forward
        model.model.layers[0].mlp.forward = lambda hidden, inside=inside: inside(OneWay.apply(hidden))
        with pytest.raises(UsageError, match=words) as caught:
            try_out(made)
        assert len(str(caught.value).splitlines()) == 1
        assert str(folder) in str(caught.value)
    made = built("l2-shrink.tiny", f'models.generator="{folder}"', "credit.mode=token")
    made.players.generator.model.forward = lambda input_ids, attention_mask=None: None
    with pytest.raises(UsageError, match="unexpected keyword argument"):
        try_out(made)


@pytest.mark.parametrize("command", [["run", "--dry-run"], ["check", "--completions", "4"]])
def test_the_commands_try_it(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that fails on the way is named before any hour is spent, with exit code 2."""

    def fail(*arguments: Any, **options: Any) -> None:
        raise NotImplementedError("grouped_mm has no forward derivative")

    monkeypatch.setattr("dpg_cli.driver.trial.metagradient", fail)
    answer = call(capsys, monkeypatch, command[0], "l2-shrink", "--prompts", "empty", *command[1:])
    assert answer.code == 2
    last = answer.err.splitlines()[-1]
    assert "The model 'tiny' cannot be attributed: grouped_mm has no forward derivative." in last


def asked_of(target: Path) -> list[str | Path]:
    """A short run on a target of one's own."""
    settings = ("credit.mode=token", "rollout.max_tokens=8", "rollout.min_tokens=1")
    given = [part for setting in settings for part in ("--set", setting)]
    return ["l2-shrink", "--target", target, "--prompts", "empty", *given]


@pytest.mark.parametrize(("name", "said"), [("bloom", "double backward"), ("mixtral", "Experts ran as 'eager'")])
def test_what_the_engine_chose_is_said(
    name: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models whose second derivative takes another way: fine, and why, in the dry run and in the check."""
    folder = saved(tiny_model(name, vocab_size=ROWS, eos_token_id=END, pad_token_id=END).float(), tmp_path / name)
    asked = asked_of(folder)
    answer = call(capsys, monkeypatch, "run", *asked, "--dry-run")
    assert answer.code == 0, answer.err
    assert said in answer.out
    answer = call(capsys, monkeypatch, "check", *asked, "--completions", "4", "--json")
    assert answer.code in (0, 1, 3), answer.err
    found = {finding["name"]: finding for finding in json.loads(answer.out)["checks"]}
    assert said in found["derivatives"]["says"]
    assert found["finite differences"]["verdict"] != "fail"


def test_what_the_engine_chose_is_said_once_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the screen of `dpg run` and `dpg attribute`, each session once; in `run.json` and in the scores' record."""
    bloom = tiny_model("bloom", vocab_size=ROWS, eos_token_id=END, pad_token_id=END).float()
    folder, said = saved(bloom, tmp_path / "bloom"), "Second derivatives by double backward"
    run = tmp_path / "run"
    small = [part for setting in ("steps=2", "dataset.examples=4", "prompts.per_step=2") for part in ("--set", setting)]
    answer = call(capsys, monkeypatch, "run", *asked_of(folder), *small, "--out", run)
    assert answer.code == 0, answer.err
    assert answer.err.count(said) == 1
    (note,) = json.loads((run / "run.json").read_text())["notes"]
    assert note.startswith(said)
    assert note in answer.err

    data, scores = tmp_path / "rows.txt", tmp_path / "scores.jsonl"
    data.write_text("the old cat sees a boat.\na king sells a map.\n")
    asked = [
        "attribute",
        data,
        "--target",
        folder,
        "--metric",
        "norm",
        "--set",
        "metric.parameter=transformer.ln_f.bias",
    ]
    answer = call(capsys, monkeypatch, *asked, "--out", scores, "--json")
    assert answer.code == 0, answer.err
    assert answer.err.count(said) == 1
    record = json.loads((tmp_path / "scores.jsonl.json").read_text())
    assert record["notes"] == json.loads(answer.out)["notes"] == [note]


def test_each_session_of_a_run_says_its_notes_once(tmp_path: Path) -> None:
    config, folder = resolve(find("l2-shrink.tiny").data(), []), RunFolder(tmp_path)
    first = Journal(folder, config, "cpu", [])
    assert first.note(("a.", "b.", "a.")) == ["a.", "b."]
    assert first.note(("b.",)) == []
    later = Journal(folder, config, "cpu", [])
    assert later.note(("b.", "c.")) == ["b.", "c."]
    assert json.loads(folder.info.read_text())["notes"] == ["a.", "b.", "c."]
    folder.info.write_text(json.dumps({"notes": 3}))
    Journal(folder, config, "cpu", []).note(("d.",))
    assert json.loads(folder.info.read_text())["notes"] == ["d."]
