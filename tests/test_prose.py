"""The embedded world of prose: its texts, the tokeniser's promises, what the cards say, and the script that made it all."""

import json
import random
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpg_cli import prose
from dpg_cli.data import prompts
from dpg_cli.errors import UsageError
from dpg_cli.metrics.registry import held_out
from dpg_cli.models import loading as models
from dpg_cli.models.embedded import EMBEDDED
from dpg_cli.prose import MODEL_DIR, READER_DIR, TEXTS_DIR, pretrain, quality, source, texts
from dpg_cli.prose.source import Chapter
from dpg_cli.prose.training import Rows
from dpg_cli.runs.folder import resolve_paths
from dpg_cli.settings.config import ModelsConfig, TextLossOptions

FOLDERS = {"prose": MODEL_DIR, "prose-reader": READER_DIR}
SIZES = {"prose": 334_464, "prose-reader": 520_832}
EOS, PAD, VOCABULARY = 1022, 1023, 1024


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module", params=list(FOLDERS))
def shipped(request):
    """Name and model, as a user's own code loads it."""
    return request.param, AutoModelForCausalLM.from_pretrained(FOLDERS[request.param])


# ---- texts


def test_prompts_are_beginnings_in_a_fixed_order_and_the_splits_share_none():
    train, evaluated = prose.prompts("train"), prose.prompts("eval")
    assert (len(train), len(evaluated)) == (4096, 512)
    assert len({*train, *evaluated}) == 4096 + 512
    assert all(4 <= len(text.split(" ")) <= 10 and text == text.strip() for text in train + evaluated)
    assert prose.prompts("eval", 5) == evaluated[:5]
    code = "from dpg_cli import prose; print(prose.prompts('train', 3), prose.heldout(1), prose.frequent_rows(21))"
    code += "; import sys; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert fresh.stdout.strip() == f"{train[:3]} {prose.heldout(1)} {prose.frequent_rows(21)}"


def test_held_out_passages_are_long_enough_and_hold_no_training_prompt():
    passages = prose.heldout()
    assert len(passages) == 649
    assert len(set(passages)) == 649
    assert min(map(len, passages)) >= texts.PASSAGE
    known = [text for text in prose.prompts("train") if len(text.split(" ")) >= 8]
    assert len(known) > 1000
    together = "\n".join(passages)
    assert sum(text in together for text in known) < 0.01 * len(
        known
    )  # "And the word of the LORD came unto me," returns
    opened = sum(any(passage.startswith(text) for passage in passages) for text in prose.prompts("eval"))
    assert opened > 100  # evaluation prompts are of the same chapters


def test_impossible_requests_are_refused():
    for call in (
        lambda: prose.prompts("test"),
        lambda: prose.prompts("eval", 513),
        lambda: prose.heldout(-1),
        lambda: prose.heldout(650),
        lambda: prose.frequent_rows(0),
        lambda: prose.frequent_rows(VOCABULARY + 1),
    ):
        with pytest.raises(UsageError):
            call()


def test_the_names_are_understood_where_models_prompts_and_texts_are_named(tmp_path):
    assert models.location("prose") == str(MODEL_DIR)
    assert EMBEDDED["prose-reader"] == READER_DIR
    assert prompts.load_prompts("prose") == prose.prompts("train")
    assert prompts.load_prompts("prose", split="eval") == prose.prompts("eval")
    found, said = held_out(TextLossOptions(name="text-loss", file="prose", documents=10))
    assert found == prose.heldout(10)
    assert said == "10 held-out passages of prose"
    assert len(held_out(TextLossOptions(name="text-loss", file="prose", documents=5000))[0]) == 649
    (tmp_path / "prose").mkdir()  # a folder of that name is named ./prose
    data = {"prompts": {"source": "prose"}, "metric": {"file": "prose"}}
    assert resolve_paths(data, tmp_path) == data
    assert resolve_paths({"prompts": {"source": "./prose"}}, tmp_path)["prompts"]["source"] == str(tmp_path / "prose")


# ---- the tokeniser


def test_the_tokeniser_gives_text_back_exactly(tokenizer):
    passages = prose.heldout(100) + prose.prompts("eval", 100)
    passages += ["", " ", "\n\n", "  Ümlaut ñandú — ça va?\t漢字 🦊 \u200b don't , stop .", "\x00\x7f", "LORD'S 1611!"]
    for text in passages:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {EOS, PAD} & set(ids)
    # a text and its continuation meet at a word's leading space, so prompt and completion are encoded apart without loss
    assert tokenizer.encode("And God said,") + tokenizer.encode(" Let there be") == tokenizer.encode(
        "And God said, Let there be"
    )


def test_the_vocabulary_is_bytes_then_merges_then_specials_and_both_models_share_it(tokenizer):
    assert len(tokenizer) == VOCABULARY
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (EOS, EOS, PAD)
    names = tokenizer.convert_ids_to_tokens(list(range(VOCABULARY)))
    assert sorted(names[:256]) == names[:256]
    assert {len(name) for name in names[:256]} == {1}
    assert min(len(name) for name in names[256:]) == 2
    for name in ("tokenizer.json", "tokenizer_config.json", prose.COUNTS):
        assert (MODEL_DIR / name).read_bytes() == (READER_DIR / name).read_bytes()


def test_the_block_of_frequent_rows_is_the_best_one(tokenizer):
    assert prose.best_block([5, 1, 3, 4, 3, 9, 0, 8], 3) == range(2, 5)
    assert prose.best_block([2, 2, 2, 2], 2) == range(2)
    assert prose.best_block([7], 1) == range(1)
    counts = prose.token_counts()
    assert len(counts) == VOCABULARY
    assert counts[PAD] == 0
    assert counts[EOS] == 1141  # one a training chapter
    for size in (1, 21, 29):
        rows = prose.frequent_rows(size)
        assert len(rows) == size
        best = min(counts[row] for row in rows)
        assert best == max(min(counts[start : start + size]) for start in range(VOCABULARY - size + 1))
    assert prose.frequent_rows(21) == range(256, 277)
    assert min(counts[256:277]) > 5e-4 * sum(counts)
    used = {token for ids in tokenizer(prose.heldout())["input_ids"] for token in ids}
    assert used >= set(prose.frequent_rows(21))
    assert len(used & set(range(21))) < 8  # bytes that prose hardly has: no place for a pattern


# ---- the models


def test_the_shipped_models_are_small_and_complete(shipped, tokenizer):
    name, model = shipped
    assert model.num_parameters() == SIZES[name]
    assert model.config.model_type == {"prose": "gpt2", "prose-reader": "llama"}[name]
    assert model.config.hidden_size == {"prose": 96, "prose-reader": 128}[name]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for settings in (model.config, model.generation_config):
        assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (EOS, EOS, PAD)
    with safe_open(FOLDERS[name] / "model.safetensors", "pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}  # noqa: SIM118
    assert {path.name for path in FOLDERS[name].iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "token_counts.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_all_that_is_shipped_takes_two_megabytes():
    folders = (MODEL_DIR, READER_DIR, TEXTS_DIR)
    assert sum(path.stat().st_size for folder in folders for path in folder.iterdir()) < 2_200_000


def test_a_run_loads_them_in_float32_and_unties_the_head():
    device = torch.device("cpu")
    settings = ModelsConfig(generator="prose-reader", target="prose")
    generator, target = models.load_generator(settings, device), models.load_target(settings, device)
    assert models.same_tokenizer(generator, target)
    assert (target.head.dtype, tuple(target.head.shape)) == (torch.float32, (VOCABULARY, 96))
    assert target.head is not target.model.get_input_embeddings().weight
    assert generator.head is generator.model.get_input_embeddings().weight
    assert (target.context, generator.context, target.eos_id, target.pad_id) == (128, 128, EOS, PAD)
    blank = models.load("prose", device=device, init="random", seed=3)
    assert blank.head.dtype == torch.float32
    assert len(blank.head.unique()) > 90_000  # drawn in float32: in float16 most values would repeat


def test_the_card_says_the_loss_on_held_out_passages(shipped, tokenizer):
    name, model = shipped
    card = (FOLDERS[name] / "README.md").read_text()
    said = [float(found) for found in re.findall(r"([0-9.]+) nats a token", card)]
    reading = quality.read(model, tokenizer, prose.heldout())
    assert reading.nats == pytest.approx(said[0], abs=2e-3)
    assert reading.opening == pytest.approx(said[1], abs=2e-3)
    assert f"{reading.tokens:,} tokens" in card
    assert f"{SIZES[name]:,} parameters" in card
    assert reading.nats < 3.3
    other = quality.read(
        model, tokenizer, [" ".join(random.Random(0).sample(t.split(), len(t.split()))) for t in prose.heldout(50)]
    )
    assert other.nats > reading.nats + 0.8  # the order of words is most of what it has learnt


def test_losses_are_those_of_transformers(shipped, tokenizer):
    _, model = shipped
    row = [EOS, *tokenizer.encode(prose.heldout(1)[0])][:60]
    ids = torch.tensor([row])
    with torch.no_grad():
        wanted = model(input_ids=ids, labels=ids).loss.item()
    short, long = quality.token_losses(model, [row[:20], row])
    assert long.mean().item() == pytest.approx(wanted, rel=1e-5)
    assert torch.allclose(short, long[:19], atol=1e-5)
    assert quality.read(model, tokenizer, prose.heldout(1)).tokens == min(
        len(tokenizer.encode(prose.heldout(1)[0])), 127
    )


def test_completions_are_prose_of_full_length(shipped, tokenizer):
    _, model = shipped
    rows = quality.sample(model, tokenizer, [*prose.prompts("eval", 24), *[""] * 24], seed=1)
    assert rows == quality.sample(model, tokenizer, [*prose.prompts("eval", 24), *[""] * 24], seed=1)
    assert sum(len(row) == 32 for row in rows) >= 45
    known = set(re.findall("[a-z]+", " ".join([*prose.heldout(), *prose.prompts("train")]).lower()))
    words = [word for row in rows for word in re.findall("[a-z]+", tokenizer.decode(row[:-2]).lower())]
    assert sum(word in known for word in words) > 0.8 * len(words)


# ---- how they were made


def chapters_of(passages):
    """Held-out passages as chapters of a text: enough of it for a vocabulary of full size."""
    return [Chapter(f"Xx{number}", tuple(re.findall(r"[^:.;?]+[:.;?]?", text))) for number, text in enumerate(passages)]


def test_the_split_is_fixed_and_a_twentieth():
    # A change here would put chapters that the shipped models have seen into the held-out split.
    assert [Chapter(name, ()).split for name in ("Ge1", "Ge4", "Psa23", "Mat2", "Rev22")] == [
        "train",
        "eval",
        "train",
        "eval",
        "train",
    ]
    names = [f"Book{number}" for number in range(4000)]
    assert 150 < sum(Chapter(name, ()).split == "eval" for name in names) < 250


def test_a_text_is_taken_apart_into_chapters_and_another_text_is_refused():
    text = "1Ki1:1 Now king David was old.\n1Ki1:2 Wherefore his servants said.\n1Ki2:1 Now the days drew nigh.\n"
    assert source.chapters(text) == [
        Chapter("1Ki1", ("Now king David was old.", "Wherefore his servants said.")),
        Chapter("1Ki2", ("Now the days drew nigh.",)),
    ]
    with pytest.raises(UsageError, match="No verse: 'In the beginning'"):
        source.chapters("In the beginning\n")
    with pytest.raises(UsageError, match=r"not the text of bible-kjv-text 4\.38"):
        source.checked(text)


def test_fetching_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(source.shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match=r"apt-get is not here\. Give it with --text FILE"):
        source.fetch()
    monkeypatch.setattr(source.shutil, "which", lambda name: name)

    def fails(command, **options):
        raise subprocess.CalledProcessError(100, command, stderr="warning\nE: Unable to locate package bible-kjv\n")

    monkeypatch.setattr(source.subprocess, "run", fails)
    with pytest.raises(UsageError, match="cannot be had from bible-kjv and bible-kjv-text: E: Unable to locate"):
        source.fetch()


def test_passages_told_in_the_same_words_are_left_out():
    told = Chapter("A", ("a b c d e f g h i j k l m n o p q r s t u v w x y z",))
    half = "1 a b c d e f g h i j k l m zz yy xx ww vv uu tt ss rr qq pp"
    new = "a b c d e f g zz h i j k l m n yy o p q r s t u xx v w x"
    assert source.unseen([told.verses[0].upper(), half, new], [told]) == [new]
    assert list(source.passages([Chapter("B", ("12345", "123", "12345678", "1"))], 8)) == ["12345 123", "12345678"]


def test_rows_start_at_a_verse_and_end_with_the_chapter(tokenizer):
    parts = [Chapter("A", ("In the beginning", "And God said,")), Chapter("B", ("Jesus wept.",))]
    rows = Rows(parts, tokenizer)
    assert len(rows) == 3
    ids, labels = rows.take([0, 1, 2], 16)
    assert ids.shape == labels.shape == (3, 16)
    for row, text in enumerate(("In the beginning And God said,", "And God said,", "Jesus wept.")):
        whole = [EOS, *tokenizer.encode(text), EOS]
        assert ids[row, : len(whole)].tolist() == whole
        assert labels[row].tolist() == [*whole[1:], *[-100] * (17 - len(whole))]
    ids, labels = rows.take([0], 3)
    assert ids.tolist() == [[EOS, *tokenizer.encode("In the beginning")[:2]]]
    assert labels[0].tolist() == tokenizer.encode("In the beginning And")[:3]


@pytest.mark.slow
def test_the_script_makes_folders_that_load_and_learns_the_same_twice(tmp_path):
    parts = chapters_of(prose.heldout())
    part = replace(pretrain.PARTS[0], recipe=replace(pretrain.PARTS[0].recipe, steps=12, batch=512))
    lines = []
    try:
        one = pretrain.make(part, parts, tmp_path / "one", lines.append)
        two = pretrain.make(part, parts, tmp_path / "two")
    finally:
        torch.use_deterministic_algorithms(False)
    assert replace(one, minutes=0.0) == replace(two, minutes=0.0)
    assert one.reading.nats < 6.7  # ln 1024 = 6.93
    assert lines[-1].startswith("step    12  loss ")
    for name in {path.name for path in MODEL_DIR.iterdir()} - {"README.md"}:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config == json.loads((MODEL_DIR / "config.json").read_text())
    assert models.load(str(tmp_path / "one"), device=torch.device("cpu")).head.dtype == torch.float32


def test_the_shipped_lists_keep_their_order_when_made_again(tmp_path):
    parts = chapters_of(prose.heldout(300))
    texts.write_texts(parts, tmp_path / "one", 0)
    texts.write_texts(parts, tmp_path / "two", 0)
    for path in TEXTS_DIR.iterdir():
        assert (tmp_path / "one" / path.name).read_bytes() == (tmp_path / "two" / path.name).read_bytes()
