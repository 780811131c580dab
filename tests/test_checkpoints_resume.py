"""A run goes on with the models that it was begun with, or not at all: fingerprints, and models that moved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import CPU, MODEL, add_tokenizer, loaded, make, reconfigured, reweighted, saved
from kill_resume import contents, unequal
from short_run import call
from transformers import AutoTokenizer

from dpg_cli.driver.execute import StopRequest, execute
from dpg_cli.errors import InterruptedRunError, UsageError
from dpg_cli.evidence.verify import verify_run
from dpg_cli.export.dataset import DatasetRequest, export_dataset
from dpg_cli.models.fingerprint import changes, fingerprint
from dpg_cli.models.folder import ModelError
from dpg_cli.runs.folder import RunFolder
from dpg_cli.settings.config import Config
from dpg_cli.settings.presets import find, resolve

SMALL = [
    "steps=3", "prompts.per_step=2", "rollout.group_size=2", "rollout.max_tokens=4", "rollout.min_tokens=2",
    "inner.batch_size=2", "policy.minibatch=4", "dataset.examples=6", "checkpoint.every_steps=1", "credit.mode=token",
]  # fmt: skip
Damage = Callable[[Path], object]


def other_weights(folder: Path) -> None:
    reweighted(folder, lambda tensors: {name: t * 1.0001 if "norm" in name else t for name, t in tensors.items()})


def other_words(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def other_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")


DAMAGES: dict[str, tuple[Damage, str]] = {
    "weights": (other_weights, "other weights"),
    "rope": (lambda folder: reconfigured(folder, rope_parameters={"rope_type": "default", "rope_theta": 9e3}), "configuration"),
    "epsilon": (lambda folder: reconfigured(folder, rms_norm_eps=1e-5), "another configuration"),
    "merges": (other_words, "another tokeniser"),
    "template": (other_template, "another chat template"),
    "ends": (lambda folder: reconfigured(folder, "generation_config.json", eos_token_id=[510, 3]), "another tokeniser"),
    "model": (lambda folder: saved(make("gpt2"), folder), "other weights and another configuration"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_every_change_of_a_model_shows_in_its_fingerprint(name: str, tmp_path: Path) -> None:
    folder = saved(make("llama"), tmp_path / "model")
    before = fingerprint(loaded(folder))
    DAMAGES[name][0](folder)
    assert DAMAGES[name][1] in " and ".join(changes(before, fingerprint(loaded(folder))))


def test_what_changes_nothing_leaves_the_fingerprint_alone(tmp_path: Path) -> None:
    """Another place, other files for the same weights, a use of the tokeniser, another release's mark, the order of keys."""
    model = make("llama", tied=True)
    folder = saved(model, tmp_path / "model")
    before = fingerprint(loaded(folder))
    assert changes(before, fingerprint(loaded(saved(model, tmp_path / "b c", max_shard_size="20KB")))) == []
    reconfigured(folder, transformers_version="4.0", _name_or_path="elsewhere", use_cache=False)
    reweighted(folder, lambda tensors: dict(reversed(tensors.items())))
    found = loaded(folder)
    found.tokenizer(["a", "longer text"], padding=True, truncation=True, max_length=7)
    assert changes(before, fingerprint(found)) == []
    assert set(before) == {"weights", "config", "tokenizer", "template"}
    assert all(len(value) == 64 for value in before.values())
    with torch.no_grad():
        next(found.model.parameters()).view(-1)[0] += 1e-6
    assert changes(before, fingerprint(found)) == ["other weights"]


def settings(target: Path, generator: Path, *more: str) -> Config:
    models = [f"models.target={json.dumps(str(target))}", f"models.generator={json.dumps(str(generator))}"]
    return resolve(find("l2-shrink.tiny").data(), [*SMALL, *models, *more])


Begun = tuple[RunFolder, Path, Path]


def copied(place: Path, to: Path) -> Begun:
    """A project's folder copied, with the places that its run names."""
    for path in place.iterdir():
        shutil.copytree(path, to / path.name)
    for file in (to / "run").rglob("*"):
        if file.suffix in (".toml", ".json") and file.is_file():
            file.write_text(file.read_text().replace(str(place), str(to)))
    return RunFolder(to / "run"), to / "the target", to / "generator"


@pytest.fixture(scope="module")
def projects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two folders with a target, a generator and a run: one stopped after its first outer step, one finished."""
    stopped, finished = tmp_path_factory.mktemp("stopped"), tmp_path_factory.mktemp("finished")
    target, generator = saved(make("llama"), stopped / "the target"), saved(make("gpt2"), stopped / "generator")
    folder, stop = RunFolder(stopped / "run"), StopRequest()
    with pytest.raises(InterruptedRunError):
        execute(settings(target, generator), folder, stop=stop, on_step=lambda report: setattr(stop, "asked", True))
    folder, target, generator = copied(stopped, finished)
    execute(settings(target, generator), folder, resume=True)
    return {"stopped": stopped, "finished": finished}


@pytest.fixture
def begun(projects: dict[str, Path], tmp_path: Path) -> Begun:
    """A run that was stopped after its first outer step, and the folders of its target and generator."""
    return copied(projects["stopped"], tmp_path)


@pytest.fixture
def done(projects: dict[str, Path], tmp_path: Path) -> Begun:
    """The same run, finished."""
    return copied(projects["finished"], tmp_path)


def test_a_changed_model_stops_a_resume(
    begun: Begun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2, one line that says what changed, and the run as it was; back in its place, the run goes on."""
    folder, target, generator = begun
    info, log = folder.info.read_bytes(), folder.metrics.read_bytes()
    kept = {
        role: shutil.copytree(path, path.with_name(f"kept {role}"))
        for role, path in (("target", target), ("generator", generator))
    }
    for role, path, name in (
        ("target", target, "weights"),
        ("target", target, "template"),
        ("generator", generator, "merges"),
    ):
        DAMAGES[name][0](path)
        answer = call(capsys, monkeypatch, "resume", folder.path)
        assert answer.code == 2
        last = answer.err.splitlines()[-1]
        assert f"The {role} {str(path)!r} is not the one that {folder.path} was begun with" in last
        assert DAMAGES[name][1] in last
        assert f"dpg resume {folder.path} --{role} FOLDER" in last
        assert (folder.info.read_bytes(), folder.metrics.read_bytes()) == (info, log)
        shutil.rmtree(path)
        shutil.copytree(kept[role], path)
    assert call(capsys, monkeypatch, "resume", folder.path).code == 0


def test_a_project_that_moved(
    begun: Begun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Named again, the same models go on to the same bytes as a run that stayed; others at the new place are refused."""
    folder, target, generator = begun
    stayed = shutil.copytree(folder.path, tmp_path / "stayed")
    assert call(capsys, monkeypatch, "resume", stayed).code == 0
    new = tmp_path / "new place"
    new.mkdir()
    for path in (target, generator):
        shutil.move(path, new / path.name)
    folder = RunFolder(Path(shutil.move(folder.path, new / "run")))
    answer = call(capsys, monkeypatch, "resume", folder.path)
    assert answer.code == 2
    assert f"dpg resume '{folder.path}' --target FOLDER" in answer.err
    answer = call(capsys, monkeypatch, "resume", folder.path, "--target", new / "generator")
    assert answer.code == 2
    assert "is not the one" in answer.err
    assert str(new) not in folder.config.read_text()
    places = ["--target", new / "the target", "--generator", new / "generator"]
    answer = call(capsys, monkeypatch, "resume", folder.path, *places)
    assert answer.code == 0, answer.err
    assert folder.read_config().models.target == str(new / "the target")
    assert folder.read_config().models.generator == str(new / "generator")
    found, wanted = contents(folder.path), contents(stayed)
    for differing in (
        "config.toml",
        "checkpoints/step-2/state.json",
        "checkpoints/step-3/state.json",
    ):  # they name places
        del found[differing], wanted[differing]
    faults = [
        fault for fault in unequal(folder.path, wanted) if "config.toml" not in fault and "state.json" not in fault
    ]
    assert [fault for fault in faults if "generator/" in fault or "dataset/" in fault or "metrics" in fault] == []
    assert folder.generator.joinpath(MODEL).read_bytes() == (stayed / "generator" / MODEL).read_bytes()
    assert folder.metrics.read_text().count("\n") == 3


def test_the_same_model_at_another_place_may_be_named_by_a_new_run_command(begun: Begun, tmp_path: Path) -> None:
    """`--out RUN --resume` with another path: the fingerprint stands for it."""
    folder, target, generator = begun
    copy = shutil.copytree(target, tmp_path / "copy")
    assert execute(settings(copy, generator), folder, resume=True).sessions == 2
    with pytest.raises(UsageError, match=r"inner\.lr"):
        execute(settings(copy, generator, "inner.lr=0.5"), folder, resume=True)


def test_a_run_of_an_earlier_release(
    begun: Begun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without fingerprints names must do: a model cannot be named again; from now on there is a fingerprint."""
    folder, target, generator = begun
    info = json.loads(folder.info.read_text())
    assert set(info.pop("fingerprints")) == {"generator", "target"}
    folder.info.write_text(json.dumps(info))
    copy = shutil.copytree(target, tmp_path / "copy")
    answer = call(capsys, monkeypatch, "resume", folder.path, "--target", copy)
    assert answer.code == 2
    assert "has no fingerprint of its target" in answer.err
    with pytest.raises(UsageError, match=r"models\.target is "):
        execute(settings(copy, generator), folder, resume=True)
    execute(settings(target, generator), folder, resume=True)
    assert json.loads(folder.info.read_text())["fingerprints"]["target"] == fingerprint_of(target)


def fingerprint_of(target: Path) -> dict[str, str]:
    """As a run takes it: the head untied, where the settings say so."""
    from dpg_cli.models.loading import load_target
    from dpg_cli.settings.config import ModelsConfig

    return fingerprint(load_target(ModelsConfig(target=str(target)), CPU))


def test_what_is_done_with_a_finished_run_takes_no_other_models(
    done: Begun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Verification, new examples of the untrained generator, and pictures of the change compare with θ_0: the right one."""
    folder, target, generator = done
    other_weights(target)
    with pytest.raises(UsageError, match=r"The target .* other weights.*dpg resume .* --target"):
        verify_run(folder)
    answer = call(capsys, monkeypatch, "verify", folder.path)
    assert answer.code == 2
    answer = call(
        capsys,
        monkeypatch,
        "inspect",
        folder.path,
        "--render",
        "x.png",
        "--tensor",
        "model.layers.0.mlp.up_proj.weight",
    )
    assert answer.code == 2
    assert "is not the one" in answer.err
    shutil.rmtree(target)
    with pytest.raises(UsageError, match=r"If the target has moved: dpg resume .* --target FOLDER"):
        verify_run(folder)
    request = DatasetRequest("jsonl", tmp_path / "a.jsonl", "control", 4, None, None, 0, False, "cpu")
    assert export_dataset(folder, request).rows == {"train": 4}
    other_weights_of_gpt2(generator)
    with pytest.raises(UsageError, match=r"The generator .* other weights"):
        export_dataset(folder, DatasetRequest("jsonl", tmp_path / "b.jsonl", "control", 4, None, None, 0, False, "cpu"))


def other_weights_of_gpt2(folder: Path) -> None:
    reweighted(folder, lambda tensors: {name: t + 0.001 if "ln_f" in name else t for name, t in tensors.items()})


def test_a_finished_run_is_pointed_to_a_new_place(
    done: Begun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There is nothing to go on with, but verify finds the model again."""
    folder, target, _ = done
    moved = shutil.move(target, tmp_path / "moved")
    answer = call(capsys, monkeypatch, "resume", folder.path, "--target", moved)
    assert answer.code == 0
    assert "nothing to go on with" in answer.err
    with pytest.raises(UsageError) as caught:
        verify_run(folder)  # six examples are too few for it, which is said after the models were found
    assert "cuts it into" in str(caught.value)


@pytest.mark.parametrize("role", ["generator", "target"])
@pytest.mark.parametrize("damage", ["prefix", "cut", "head"])
def test_models_that_a_run_left_are_read_as_strictly(role: str, damage: str, done: Begun, tmp_path: Path) -> None:
    """Exports load RUN/generator and RUN/target: damaged, they are refused, and nothing is written."""
    folder = done[0]
    place = folder.path / role
    if damage == "cut":
        data = (place / MODEL).read_bytes()
        (place / MODEL).write_bytes(data[: len(data) // 2])
    elif damage == "prefix":
        reweighted(place, lambda tensors: {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()})
    else:
        reweighted(place, lambda tensors: {name: t for name, t in tensors.items() if "lm_head" not in name})
    out = tmp_path / "out.jsonl"
    with pytest.raises(UsageError) as caught:
        export_dataset(folder, DatasetRequest("jsonl", out, "train", 4, None, None, 0, False, "cpu"))
    assert str(place) in str(caught.value)
    assert not out.exists()
    if damage != "cut":
        assert isinstance(caught.value, ModelError)


def test_a_checkpoint_of_trls_is_read_as_strictly(tmp_path: Path) -> None:
    """transformers' trainer warns of missing weights, and trains on."""
    pytest.importorskip("trl", reason="the extra `trl` is not installed")
    from dpg_cli.driver.trl.trainer import require_whole

    folder = saved(make("gpt2"), tmp_path / "checkpoint-4")
    require_whole(folder)
    reweighted(folder, lambda tensors: {f"module.{name}": tensor for name, tensor in tensors.items()})
    with pytest.raises(UsageError, match=r"checkpoint-4 do not fit.*Remove that checkpoint"):
        require_whole(folder)
    (folder / MODEL).write_bytes((folder / MODEL).read_bytes()[:1000])
    with pytest.raises(UsageError, match=r"cut short or damaged.*Remove that checkpoint"):
        require_whole(folder)


def test_the_tokenisers_class_is_not_in_the_way(tmp_path: Path) -> None:
    """A tokeniser saved again by this transformers is the same one."""
    folder = saved(make("llama"), tmp_path / "model")
    before = fingerprint(loaded(folder))
    AutoTokenizer.from_pretrained(add_tokenizer(tmp_path / "tokenizer")).save_pretrained(folder)
    assert changes(before, fingerprint(loaded(folder))) == []
