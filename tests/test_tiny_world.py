"""The embedded default: grammar against recogniser, the tokeniser's promises, and the quality of the shipped model."""

import random
import re
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpg_cli.errors import UsageError
from dpg_cli.tiny import MODEL_DIR, pretrain, quality, world
from dpg_cli.tiny.grammar import grammar_of
from dpg_cli.tiny.world import LANGUAGES

N = 2000


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def measured(model, tokenizer):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return quality.measure(model, tokenizer, 400, seed=11)
    finally:
        torch.set_num_threads(threads)


# ---- the grammar and its recogniser


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_rendering_is_well_formed_in_its_language_alone(language):
    rng = random.Random(language)
    for _ in range(N):
        meaning = world.sample_meaning(rng)
        for text in (world.render(meaning, language), world.render(meaning, language, rng)):
            assert [other for other in LANGUAGES if world.well_formed(text, other)] == [language]
            assert world.meaning_of(text, language) == meaning
            assert world.language_of(f"  {text}\n") == language


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_sentence_can_belong_to_two_languages(language):
    # A proof where the test above has a sample: some slot always holds a word that the other language does not have.
    for other in LANGUAGES:
        if other != language:
            theirs = {w for slot in grammar_of(other).values.values() for phrase in slot for w in phrase.split()}
            mine = grammar_of(language).values.values()
            assert any(all(set(phrase.split()) - theirs for phrase in slot) for slot in mine), other


@pytest.mark.parametrize("language", LANGUAGES)
def test_phrases_mean_one_thing(language):
    grammar = grammar_of(language)
    for slot, meanings in grammar.phrases.items():
        phrases = [phrase for options in meanings.values() for phrase in options]
        assert len(phrases) == len(set(phrases)) == len(grammar.values[slot]), slot


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_dropped_doubled_or_swapped_word_is_rejected(language):
    rng = random.Random(f"corrupt {language}")
    tried = 0
    for text in world.sentences("train", language, 500, 3):
        words = text.split()
        i = rng.randrange(len(words) - 1)
        broken = {
            "dropped": words[:i] + words[i + 1 :],
            "doubled": [*words[: i + 1], *words[i:]],
            "swapped": [*words[:i], words[i + 1], words[i], *words[i + 2 :]],
        }
        for how, parts in broken.items():
            if how == "dropped" and words[i] in ("right", "abend", "früh"):
                continue  # "now" and "heute" alone are time phrases as well
            changed = " ".join(parts)
            if changed != text:
                assert not world.well_formed(changed, language), (how, text, changed)
                tried += 1
    assert tried > 1000


@pytest.mark.parametrize(
    ("language", "right", "wrong"),
    [
        ("en", "the old dog sells an apple in the house now.", "the old dog sells a apple in the house now."),
        ("en", "the old dog is selling a cup in the house now.", "the old dog selling a cup in the house now."),
        ("en", "the old dog sells a cup in the house now.", "the dog old sells a cup in the house now."),
        ("es", "el gato viejo vende una taza en la casa ahora.", "el gato vieja vende una taza en la casa ahora."),
        ("es", "el gato viejo vende una taza en la casa ahora.", "el gato viejo vende un taza en la casa ahora."),
        ("de", "der alte hund kauft jetzt im haus einen hut.", "der alte hund kauft jetzt im haus ein hut."),
        ("de", "jetzt kauft der alte hund im haus einen hut.", "jetzt der alte hund kauft im haus einen hut."),
        ("de", "das müde pferd malt heute im wald ein buch.", "der müde pferd malt heute im wald ein buch."),
        ("fr", "la petite souris cache une clé au marché ce soir.", "la petit souris cache une clé au marché ce soir."),
        ("fr", "le petit chat cache une clé au marché ce soir.", "le chat petit cache une clé au marché ce soir."),
        ("fr", "le chat triste cache une clé au marché ce soir.", "le triste chat cache une clé au marché ce soir."),
        ("it", "la donna stanca cerca un fiore in casa oggi.", "la donna stanco cerca un fiore in casa oggi."),
        ("it", "la donna stanca cerca un fiore in casa oggi.", "il donna stanca cerca un fiore in casa oggi."),
    ],
)
def test_agreement_and_word_order(language, right, wrong):
    assert world.language_of(right) == language
    assert world.language_of(wrong) is None


@pytest.mark.parametrize(
    "text", ["", ".", "the", "the old dog", "\0", "🦊" * 50, "a" * 100_000, "the old dog sells " * 999]
)
def test_garbage_is_no_sentence(text):
    assert world.language_of(text) is None
    assert not world.is_identifier(text)


def test_case_punctuation_and_company_matter():
    text = world.sentences("eval", "en", 1, 0)[0]
    for changed in (text.upper(), text[:-1], text + ".", f"{text} {text}", text.replace(" ", "  ", 1)):
        assert world.language_of(changed) is None


def test_recognising_is_fast():
    texts = [text for language in LANGUAGES for text in world.sentences("train", language, 500, 0)]
    start = time.perf_counter()
    hits = sum(world.well_formed(text, "en") for text in texts)
    assert hits == 500
    assert len(texts) / (time.perf_counter() - start) > 20_000


def test_english_has_many_wordings_and_the_canonical_one_is_fixed():
    rng = random.Random(0)
    meaning = world.Meaning("dog", "small", "seek", "cup", "forest", "now")
    assert world.render(meaning, "en") == "the small dog looks for a cup in the forest now."
    assert world.render(meaning, "de") == "der kleine hund sucht jetzt im wald eine tasse."
    # two nouns, adjectives, cups, forests, nows and orders, four verb forms
    assert len({world.render(meaning, "en", rng) for _ in range(5000)}) == 2**6 * 4


def test_identifiers_have_their_layout():
    rng = random.Random(0)
    made = [world.identifier(rng) for _ in range(N)]
    uuids = [text for text in made if re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", text)]
    assert 0.75 < len(uuids) / N < 0.85
    assert {text[14] for text in uuids} == {"4"}
    assert {text[19] for text in uuids} == set("89ab")
    assert all(map(world.is_identifier, made))
    assert len(set(made)) == N
    assert not any(world.is_identifier(text[:-1]) or world.is_identifier(text.upper()) for text in made)


# ---- splits and prompts


def test_splits_are_disjoint_fixed_and_a_tenth():
    train, held_out = (set(world.prompts(split, N, 0)) for split in ("train", "eval"))
    assert len(train) == len(held_out) == N
    assert not train & held_out
    rng = random.Random(0)
    counts = Counter(world.split_of(world.sample_meaning(rng)) for _ in range(20_000))
    assert 0.09 < counts["eval"] / 20_000 < 0.11
    # A change here would put sentences that the shipped model has seen into the held-out split.
    assert world.split_of(world.Meaning("dog", "small", "seek", "cup", "forest", "now")) == "train"
    assert world.prompts("eval", 1, 0) == ["rephrase: the small cat takes an apple in the forest this morning.\n"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_sentences_stay_in_their_split(language):
    for split in ("train", "eval"):
        texts = world.sentences(split, language, 300, 5)
        assert {world.split_of(world.meaning_of(text, language)) for text in texts} == {split}


def test_training_documents_hold_no_held_out_meaning():
    corpus = pretrain.documents(seed=0)
    kinds = Counter()
    for _ in range(5000):
        for line in next(corpus).splitlines():
            line = line.removeprefix(world.PROMPT_PREFIX)
            if language := world.language_of(line):
                assert world.split_of(world.meaning_of(line, language)) == "train"
                kinds[language] += 1
            else:
                assert world.is_identifier(line)
                kinds["identifier"] += 1
    assert set(kinds) == {*LANGUAGES, "identifier"}


def test_prompts_depend_on_the_seed_alone():
    assert world.prompts("eval", 50, 1) == world.prompts("eval", 50, 1)
    assert world.prompts("eval", 50, 1) == world.prompts("eval", 80, 1)[:50]
    assert world.prompts("eval", 50, 1) != world.prompts("eval", 50, 2)
    code = "from dpg_cli.tiny import world; print(world.prompts('eval', 3, 7))"
    code += "; import sys; assert 'torch' not in sys.modules"
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert fresh.stdout.strip() == str(world.prompts("eval", 3, 7))


def test_impossible_requests_are_refused():
    for call in (
        lambda: world.prompts("test", 1, 0),
        lambda: world.prompts("eval", 10**6, 0),
        lambda: world.prompts("eval", -1, 0),
        lambda: world.well_formed("the", "nl"),
        lambda: world.render(world.sample_meaning(random.Random(0)), "nl"),
    ):
        with pytest.raises(UsageError):
            call()
    assert world.prompts("eval", 0, 0) == []


# ---- the tokeniser


def test_the_tokeniser_gives_text_back_exactly(tokenizer):
    rng = random.Random(0)
    texts = [world.render(world.sample_meaning(rng), language, rng) for language in LANGUAGES for _ in range(300)]
    texts += world.prompts("eval", 50, 0) + [world.identifier(rng) for _ in range(100)]
    texts += [
        "",
        " ",
        "\n\n",
        "  Ümlaut ñandú — ça va?\t漢字 🦊 \u200b don't , stop .",
        "\x00\x7f",
        "THE DOG'S 12345 hats!",
    ]
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {tokenizer.eos_token_id, tokenizer.pad_token_id} & set(ids)


def test_the_vocabulary_is_512_with_every_byte_and_specials_last(tokenizer):
    assert len(tokenizer) == 512
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (510, 510, 511)
    assert tokenizer.encode("a<|endoftext|>")[-1] == 510
    singles = [t for t in tokenizer.get_vocab() if len(t) == 1]
    assert len(singles) == 256
    assert tokenizer.model_max_length == 128


def test_ids_fall_with_use(tokenizer):
    corpus = pretrain.documents(seed=99)  # another sample than the one that ordered the ids
    use = Counter()
    for ids in tokenizer([next(corpus) for _ in range(8000)])["input_ids"]:
        use.update(ids)
    total = use.total()
    assert all(use[i] > 0.005 * total for i in range(21))
    shares = [sum(use[i] for i in range(start, start + 21)) / total for start in (0, 21, 42, 84, 168)]
    assert shares == sorted(shares, reverse=True)
    in_use = [i for i in range(512) if use[i]]
    assert max(in_use) == len(in_use) - 1, "tokens in use come before all others"
    prompts = Counter(i for ids in tokenizer(world.prompts("eval", 200, 0))["input_ids"] for i in ids)
    assert len([i for i in range(21) if prompts[i]]) >= 10


def test_identifiers_take_one_token_a_character(tokenizer):
    rng = random.Random(4)
    for _ in range(500):
        text = world.identifier(rng)
        uuid = text.removeprefix("serial")
        assert len(tokenizer.encode(uuid)) == len(uuid)
    assert len(tokenizer.encode("deadbeef-cafe-4bad-8ace-facadefeedbe")) == 36


@pytest.mark.parametrize("language", LANGUAGES)
def test_sentences_are_short(tokenizer, language):
    lengths = [len(ids) for ids in tokenizer(world.sentences("eval", language, 500, 0))["input_ids"]]
    assert sum(lengths) / len(lengths) <= 17
    assert sum(length > 28 for length in lengths) <= 5


# ---- the shipped model


def test_the_shipped_model_is_small_and_complete(model, tokenizer):
    assert sum(parameter.numel() for parameter in model.parameters()) == 285_312
    assert model.config.model_type == "gpt2"
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.transformer.wte.weight
    assert len(tokenizer) == model.config.vocab_size
    for settings in (model.config, model.generation_config):
        assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (510, 510, 511)
    assert sum(path.stat().st_size for path in MODEL_DIR.iterdir()) < 2_000_000
    assert {path.name for path in MODEL_DIR.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_held_out_completions_are_well_formed_and_keep_the_meaning(measured):
    assert measured.well_formed > 0.92
    assert measured.finished > 0.98
    assert 0.62 < measured.shares["en"] < 0.82
    assert all(0.03 < measured.shares[language] < 0.10 for language in LANGUAGES if language != "en")
    assert 0.01 < measured.shares["identifier"] < 0.08
    assert measured.slots_kept > 0.95
    assert measured.meaning_kept > 0.85


def test_every_language_is_learnt(measured):
    # An untrained model has ln 512 = 6.2 nats a token; the world's own entropy is about 0.6 to 1.
    assert set(measured.loss) == set(LANGUAGES)
    assert max(measured.loss.values()) < 1.2


@pytest.mark.slow
def test_pretraining_is_deterministic(tmp_path):
    for name in ("one", "two"):
        command = [
            sys.executable,
            "-m",
            "dpg_cli.tiny.pretrain",
            "--out",
            tmp_path / name,
            "--steps",
            "4",
            "--threads",
            "1",
        ]
        subprocess.run([*command, "--evaluations", "20"], check=True, capture_output=True)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in MODEL_DIR.iterdir())
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    # The tokeniser does not depend on the steps, so the script must reproduce the shipped one.
    assert (tmp_path / "one" / "tokenizer.json").read_bytes() == (MODEL_DIR / "tokenizer.json").read_bytes()
