"""Rewards of a text alone: by hand, and as settings."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from dpg_cli.errors import ConfigError, UsageError
from dpg_cli.rewards import EditDistance, LanguageId, build_text_reward
from dpg_cli.settings.config import validate
from dpg_cli.tiny import MODEL_DIR, world

CPU = torch.device("cpu")
SEQUENCE = {"credit": {"mode": "sequence"}}
SPANISH = {"metric": {"name": "text-loss", "language": "es"}}


def test_edit_distance_by_hand() -> None:
    reward = EditDistance(["kitten", "abc"], CPU)
    # kitten -> sitting: 3 of 7; sitting -> abc: 7 of 7. abc -> kitten 6 of 6, abc -> abc 0.
    assert reward(["sitting", "abc", ""]).tolist() == pytest.approx([-(3 / 7 + 1) / 2, -0.5, -1.0], rel=1e-6)


def test_language_identification_ranks_the_asked_language_first() -> None:
    for language in world.LANGUAGES:
        reward = LanguageId(language, CPU)
        means = {other: float(reward(world.sentences("eval", other, 20, seed=0)).mean()) for other in world.LANGUAGES}
        assert max(means, key=means.__getitem__) == language, means
        assert means[language] > -0.7
        assert all(mean < means[language] - 1 for other, mean in means.items() if other != language), means


def test_language_probabilities_add_up_to_one() -> None:
    texts = ["el gato come", "", "\u2603", "x" * 3000, "THE CAT", "\ud800"]
    total = sum(LanguageId(language, CPU)(texts).exp() for language in world.LANGUAGES)
    torch.testing.assert_close(total, torch.ones(len(texts), dtype=torch.float64))
    assert float(LanguageId("es", CPU)([""])[0]) == pytest.approx(-math.log(len(world.LANGUAGES)), abs=1e-9)


def test_settings_make_the_reward() -> None:
    assert build_text_reward(validate(SPANISH), CPU) is None
    reward = build_text_reward(validate({**SPANISH, **SEQUENCE, "attribution": {"method": "language-id"}}), CPU)
    assert isinstance(reward, LanguageId)
    assert reward.language == "es"
    settings = {"method": "edit-distance", "documents": 5}
    reward = build_text_reward(validate({**SPANISH, **SEQUENCE, "attribution": settings}), CPU)
    assert isinstance(reward, EditDistance)
    assert reward.texts == world.sentences("eval", "es", 256, seed=1)[:5]


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        ({"attribution": {"method": "naive"}, **SEQUENCE}, "every completion gets the same reward"),
        ({"attribution": {"method": "naive", "cross_group": False}}, "needs a value for each token"),
        ({"attribution": {"method": "edit-distance"}, **SEQUENCE}, "it is for text-loss tasks"),
        ({"attribution": {"method": "language-id"}, **SEQUENCE}, "needs a language"),
        ({"attribution": {"method": "language-id"}, **SPANISH}, "needs a value for each token"),
        ({"attribution": {"method": "embedding"}, **SEQUENCE, **SPANISH}, "needs a folder or a hub name"),
        ({"attribution": {"inner_runs": 65}}, "more than the 64 groups"),
        ({"attribution": {"inner_runs": 6, "cross_group": False}}, "multiple of rollout.group_size"),
        ({"attribution": {"inner_runs": 260, "cross_group": False}}, "at most 256"),
        ({"attribution": {"sgd_lr": -1.0}}, "attribution.sgd_lr"),
        ({"attribution": {"method": "adam"}}, "attribution.method"),
        ({"attribution": {"foo": 1}}, "attribution.foo: unknown setting"),
    ],
)
def test_combinations_without_meaning_are_refused(data: dict, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault) as caught:
        validate(data)
    assert "\n" not in str(caught.value)


def test_runs_of_an_attribution() -> None:
    assert validate({}).attribution_runs == 1
    assert validate({"attribution": {"cross_group": False}}).attribution_runs == 4
    assert validate({"attribution": {"inner_runs": 8}}).attribution_runs == 8
    naive = {"attribution": {"method": "naive", "cross_group": False, "inner_runs": 8}, **SEQUENCE}
    assert validate(naive).attribution_runs == 8


def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    settings = {"method": "embedding", "embedding_model": "x"}
    with pytest.raises(UsageError, match=r"needs sentence-transformers.*dpg-cli\[embedding\]"):
        build_text_reward(validate({**SPANISH, **SEQUENCE, "attribution": settings}), CPU)


def test_embedding_similarity(tmp_path: Path) -> None:
    """With a sentence model made of the embedded LM: a held-out text is closer to them all than another language's."""
    library = pytest.importorskip("sentence_transformers", reason="the optional extra `embedding` is not installed")
    modules = pytest.importorskip(
        "sentence_transformers.sentence_transformer.modules", reason="this version has its modules elsewhere"
    )
    from dpg_cli.rewards import Embedding

    parts = [modules.Transformer(str(MODEL_DIR)), modules.Pooling(96)]
    library.SentenceTransformer(modules=parts, device="cpu").save(str(tmp_path / "model"))
    spanish, english = (world.sentences("eval", language, 30, seed=1) for language in ("es", "en"))
    reward = Embedding(spanish, str(tmp_path / "model"), CPU)
    texts = [*world.sentences("train", "es", 10, seed=2), *english[:10]]
    values = reward(texts)
    vectors = torch.nn.functional.normalize(reward.model.encode([*texts, *spanish], convert_to_tensor=True).double())
    torch.testing.assert_close(values, (vectors[:20] @ vectors[20:].T).mean(1), rtol=1e-5, atol=1e-6)
    assert float(values[:10].mean()) > float(values[10:].mean())
    with pytest.raises(UsageError, match="cannot be loaded"):
        Embedding(spanish, str(tmp_path / "none"), CPU)
