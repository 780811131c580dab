"""The final dataset: drawn in parts, attributed as a whole, streamed to parquet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from builders import save_gpt2

from dpg_cli.artefacts import dataset as dataset_module
from dpg_cli.artefacts import draft as draft_module
from dpg_cli.artefacts import rows as rows_module
from dpg_cli.artefacts.dataset import draws
from dpg_cli.data.prompts import PromptSampler
from dpg_cli.driver.build import Built, build
from dpg_cli.driver.final import final_data
from dpg_cli.engine.attribution import AttributionSpec, attribute_examples
from dpg_cli.engine.generator.align import read_completions
from dpg_cli.engine.generator.rollout import sample
from dpg_cli.engine.records import Rollout
from dpg_cli.runs.folder import RunFolder
from dpg_cli.settings.config import Config
from dpg_cli.settings.presets import find, resolve

EXAMPLES = 50
SETTINGS = [
    "steps=2", "prompts.per_step=4", "rollout.group_size=3", "rollout.max_tokens=10", "rollout.min_tokens=2",
    "rollout.batch_size=6",
    "inner.batch_size=6", "policy.minibatch=6", f"dataset.examples={EXAMPLES}",
]  # fmt: skip


def made(*more: str) -> tuple[Config, Built]:
    config = resolve(find("pattern-67.tiny").data(), [*SETTINGS, *more])
    return config, build(config)


def drawn(config: Config, built: Built) -> list[Rollout]:
    players = built.players
    return list(draws(players.generator, built.spec, built.prompts, EXAMPLES, config.steps, config.seed + 2))


def rows_of(parts: list[Rollout]) -> list[tuple[str, list[int]]]:
    return [
        (prompt, ids[mask].tolist())
        for part in parts
        for prompt, ids, mask in zip(part.prompts, part.ids_N_K, part.mask_N_K, strict=True)
    ]


def at_once(config: Config, built: Built) -> Rollout:
    """The whole dataset by one call of `sample`."""
    groups = -(-EXAMPLES // 3)
    prompts = PromptSampler(built.prompts.prompts, groups, built.prompts.seed + 1 + config.steps).at(0)
    rng = torch.Generator().manual_seed(config.seed + 2)
    generator = built.players.generator
    rollout = sample(generator.model, generator.tokenizer, prompts, built.spec.sampling, rng)
    return rollout.rows(torch.arange(EXAMPLES))


@pytest.mark.parametrize("portable", ["true", "false"])
def test_parts_change_no_row(portable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, built = made(f"rollout.portable={portable}")
    whole = rows_of([at_once(config, built)])
    assert len(whole) == EXAMPLES
    assert len({tuple(ids) for _, ids in whole}) > EXAMPLES // 2
    for rows, parts in ((2048, 1), (12, 5), (1, 9)):
        monkeypatch.setattr(dataset_module, "ROWS_AT_ONCE", rows)
        found = drawn(config, built)
        assert len(found) == parts
        assert rows_of(found) == whole


def test_progress_ends_with_all_examples() -> None:
    _, built = made()
    seen: list[tuple[int, int]] = []
    list(
        draws(
            built.players.generator, built.spec, built.prompts, EXAMPLES, 0, 0,
            progress=lambda done, total: seen.append((done, total)),
        )
    )  # fmt: skip
    assert [done for done, _ in seen] == [*range(6, 49, 6), 50]
    assert {total for _, total in seen} == {EXAMPLES}


def table(folder: RunFolder, name: str = "train") -> dict[str, list[Any]]:
    return pq.read_table(folder.dataset / f"{name}.parquet").to_pydict()


@pytest.mark.parametrize("tokenizers", ["one", "two"])
def test_streamed_rewards_are_those_of_the_whole(
    tokenizers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row groups of a few rows, rewards of each token in its place, also where the target has another tokeniser."""
    more = []
    if tokenizers == "two":
        save_gpt2(tmp_path / "target")
        more = [f"models.target={tmp_path / 'target'}", 'credit.mode="token"', "models.target_init=random"]
    config, built = made(*more)
    for module in (dataset_module, draft_module, rows_module):
        monkeypatch.setattr(module, "ROWS_AT_ONCE", 12)
    folder = RunFolder(tmp_path / "run")
    folder.make()
    stages: list[str] = []
    final = final_data(config, built, folder, stages.append)

    rollout, players = at_once(config, built), built.players
    reading = read_completions(rollout, players.generator, players.target)
    spec = built.spec.rescaled(config.examples_per_step, EXAMPLES)
    assert (config.inner_steps, spec.recipe.batches.size) == (2, 25)
    wanted = attribute_examples(
        players.target.model, reading.examples, players.metric, AttributionSpec(), spec.inner, group_size=3
    )
    token_N_K = reading.collect(wanted.token_N_S)

    assert final.result.value == wanted.value
    data = table(folder)
    assert data["example_id"] == list(range(EXAMPLES))
    assert list(zip(data["prompt"], data["token_ids"], strict=True)) == rows_of([rollout])
    assert data["reward"] == pytest.approx(wanted.example_N.tolist(), rel=1e-6)
    assert max(map(abs, data["reward"])) > 0
    for row, rewards, mask in zip(token_N_K, data["token_rewards"], rollout.mask_N_K, strict=True):
        assert rewards == pytest.approx(row[mask].tolist(), rel=1e-6)
    inputs = [
        ids[mask].tolist() for ids, mask in zip(reading.examples.ids_N_S, reading.examples.attention_N_S, strict=True)
    ]
    assert data["input_ids"] == inputs
    file = pq.ParquetFile(folder.dataset / "train.parquet")
    assert [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)] == [12, 12, 12, 12, 2]
    assert {path.name for path in folder.dataset.iterdir()} == {"train.parquet", "control.parquet", "README.md"}
    assert stages == [
        "drawing the dataset: 50 examples", "fine-tuning on the dataset, rewards of its examples",
        "drawing the control: 50 examples", "fine-tuning on the control",
    ]  # fmt: skip


def test_without_rewards_nothing_else_changes(tmp_path: Path) -> None:
    found = {}
    for name in ("true", "false"):
        config, built = made(f"dataset.rewards={name}", "dataset.control=false")
        folder = RunFolder(tmp_path / name)
        folder.make()
        found[name] = (final_data(config, built, folder), table(folder))
    (with_, rows), (without, bare) = found["true"], found["false"]
    assert with_.control is None
    assert without.measures == pytest.approx(with_.measures, rel=1e-5)
    for name, value in with_.result.final.items():
        assert torch.allclose(without.result.final[name], value, rtol=1e-5, atol=1e-7)
    assert bare["reward"] == bare["token_rewards"] == [None] * EXAMPLES
    assert bare["token_ids"] == rows["token_ids"]
    assert None not in rows["reward"]


def test_the_control_is_measured_as_a_dataset_would_be(tmp_path: Path) -> None:
    """Of an untrained generator dataset and control are the same rows, and Φ is the same, rewards or not."""
    config, built = made()
    folder = RunFolder(tmp_path / "run")
    folder.make()
    final = final_data(config, built, folder)
    assert table(folder, "control")["token_ids"] == table(folder)["token_ids"]
    assert table(folder, "control")["reward"] == [None] * EXAMPLES
    assert final.control == pytest.approx(final.measures, rel=1e-5)


def test_a_draft_left_behind_is_tidied_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, built = made("dataset.control=false")
    folder = RunFolder(tmp_path / "run")
    folder.make()

    def fail(*arguments: object) -> None:
        drafts = [path.name for path in folder.dataset.iterdir()]
        assert len(drafts) == 1
        (folder.dataset / f"{drafts[0]}".replace(".draft.", ".draft.9")).write_bytes(b"of a killed process")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dpg_cli.driver.final.measure", fail)
        with pytest.raises(KeyboardInterrupt):
            final_data(config, built, folder)
    assert len(list(folder.dataset.iterdir())) == 1  # this process's own is gone
    folder.tidy()
    assert list(folder.dataset.iterdir()) == []
