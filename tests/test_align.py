"""Two tokenisers: what the target reads, and where its credits go, by hand and by property."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from builders import byte_bpe, make_target, save_gpt2, save_instruct_llama, trained_bpe
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import decoders as decoding
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from dpg_cli.engine.generator.agreement import agreement
from dpg_cli.engine.generator.align import (
    byte_alphabet,
    completion_texts,
    decode_with_ends,
    encode_with_ends,
    read_completions,
)
from dpg_cli.engine.records import Metagradient, Rollout
from dpg_cli.models.loading import LanguageModel, load
from dpg_cli.tiny import world

CPU = torch.device("cpu")


class Sized(torch.nn.Module):
    """As much of a model as reading completions needs: a context and a vocabulary."""

    def __init__(self, tokens: int, context: int | None) -> None:
        super().__init__()
        self.config = make_target("gpt2", tied=True).config.__class__(n_positions=context or 1024)
        self.embedding = torch.nn.Linear(1, tokens)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.embedding


def model_of(tokenizer: PreTrainedTokenizerFast, context: int = 1024, *ends: int) -> LanguageModel:
    end = tokenizer.eos_token_id
    return LanguageModel(Sized(len(tokenizer), context), tokenizer, "x", end, end, (end, *ends))  # type: ignore[arg-type]


def rollout_of(rows: list[list[int]], pad: int = 0) -> Rollout:
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[place < len(row) for place in range(width)] for row in rows])
    prompt = torch.zeros(len(rows), 1, dtype=torch.int64)
    return Rollout([""] * len(rows), prompt, prompt == 0, ids, mask, torch.zeros(ids.shape), 1, 0.0)


def result_of(token_N_S: torch.Tensor, labels: torch.Tensor | None = None) -> Metagradient:
    return Metagradient(0.0, {}, token_N_S.sum(1), token_N_S, labels, {}, 1.0)


SPECIALS = ["<s>", "<e>"]
WRITER = byte_bpe(
    [("©", "l"), ("l", "o"), ("w", "o"), ("wo", "r"), ("l", "d"), ("Ġ", "Ġ")], SPECIALS, bos="<s>", eos="<e>"
)
READER = byte_bpe(
    [("h", "Ã"), ("hÃ", "©"), ("l", "l"), ("Ġ", "w"), ("Ġw", "o"), ("Ġwo", "r")], ["<|x|>"], bos="<|x|>", eos="<|x|>"
)


def test_the_byte_alphabet_is_that_of_tokenizers() -> None:
    alphabet = byte_alphabet()
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(alphabet.values()) == list(range(256))
    for text in ("é", "\n\t ", "€", "\x00\x7f"):
        ((word, _),) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
        assert bytes(alphabet[character] for character in word) == text.encode()


def test_a_case_worked_by_hand() -> None:
    """ "héllo world" written as h Ã ©l lo Ġ wor ld <e>, read as hé ll o Ġwor l d and the reader's own end."""
    written = WRITER.convert_tokens_to_ids(["h", "Ã", "©l", "lo", "Ġ", "wor", "ld", "<e>"])
    reading = read_completions(rollout_of([written]), model_of(WRITER), model_of(READER))
    read = READER.convert_ids_to_tokens(reading.examples.ids_N_S[0].tolist())
    assert read == ["<|x|>", "hÃ©", "ll", "o", "Ġwor", "l", "d", "<|x|>"]
    assert reading.examples.label_N_S[0].tolist() == [False] + [True] * 7
    # é is complete with ©l, the second l and the o with lo, "r" with wor, "l" and "d" with ld; the end goes to <e>
    assert reading.place_N_S[0].tolist() == [-1, 2, 3, 3, 5, 6, 6, 7]
    credits, labels = reading.to_completions(result_of(torch.tensor([[0.0, 1, 2, 4, 8, 16, 32, 64]])))
    assert credits[0].tolist() == [0, 0, 1, 6, 0, 8, 48, 64]
    assert labels is None
    with pytest.raises(ValueError, match="one tokeniser"):
        reading.to_completions(result_of(torch.zeros(1, 8), torch.zeros(1, 8, 5)))


def test_bytes_that_are_no_text() -> None:
    """A lone C3 reads as U+FFFD, which stands once the next token shows that nothing completes it."""
    row = WRITER.convert_tokens_to_ids(["Ã", "h", "Ã"])
    ((text, ends),) = decode_with_ends(WRITER, [row])
    assert (text, ends) == ("\ufffdh\ufffd", [0, 2, 3])
    reading = read_completions(rollout_of([row]), model_of(WRITER), model_of(READER))
    # three bytes of U+FFFD each, in tokens of their own
    assert reading.examples.ids_N_S.shape[1] == 1 + 3 + 1 + 3
    assert reading.place_N_S[0].tolist() == [-1, 1, 1, 1, 1, 2, 2, 2]


def test_spaces_special_tokens_and_empty_rows() -> None:
    spaced = WRITER.convert_tokens_to_ids(["ĠĠ", "h", "<s>", "Ġ", "<e>"])
    only_end = WRITER.convert_tokens_to_ids(["<e>"])
    nothing = WRITER.convert_tokens_to_ids(["<s>"])
    reading = read_completions(rollout_of([spaced, only_end, nothing]), model_of(WRITER), model_of(READER))
    tokens = [
        READER.convert_ids_to_tokens(row[: int(length)].tolist())
        for row, length in zip(reading.examples.ids_N_S, reading.examples.attention_N_S.sum(1), strict=True)
    ]
    assert tokens == [["<|x|>", "Ġ", "Ġ", "h", "Ġ", "<|x|>"], ["<|x|>", "<|x|>"], ["<|x|>"]]
    assert reading.place_N_S[:2].tolist() == [[-1, 0, 0, 1, 3, 4], [-1, 0, -1, -1, -1, -1]]
    assert completion_texts(WRITER, [spaced]) == ["  h "]


def test_unfinished_rows_have_no_end_and_long_ones_are_cut() -> None:
    row = WRITER.convert_tokens_to_ids(["h", "Ġ", "h", "Ġ", "h"])
    writer = model_of(WRITER)
    reading = read_completions(rollout_of([row]), writer, model_of(READER))
    assert reading.examples.ids_N_S.shape[1] == 6
    cut = read_completions(rollout_of([[*row, WRITER.eos_token_id]]), writer, model_of(READER, 4))
    assert torch.equal(cut.examples.ids_N_S, reading.examples.ids_N_S[:, :4])
    assert cut.collect(torch.ones(1, 4))[0].tolist() == [1, 1, 1, 0, 0, 0]
    padded = read_completions(rollout_of([row]), writer, model_of(READER), max_length=9)
    assert padded.examples.ids_N_S.shape[1] == 9
    assert padded.examples.attention_N_S.sum() == 6


def test_an_end_of_turn_ends_a_row() -> None:
    row = WRITER.convert_tokens_to_ids(["h", "<s>"])
    reading = read_completions(rollout_of([row]), model_of(WRITER, 99, row[1]), model_of(READER))
    assert reading.place_N_S[0].tolist() == [-1, 0, 1]


def test_one_tokeniser_keeps_every_token(tmp_path) -> None:
    model = load("tiny", device=CPU)
    ids = [model.tokenizer(text)["input_ids"] for text in world.sentences("eval", "fr", 3, seed=0)]
    rollout = rollout_of(ids, model.pad_id)
    reading = read_completions(rollout, model, model)
    assert torch.equal(reading.examples.ids_N_S[:, 1:], rollout.ids_N_K)
    token_N_S = torch.rand(reading.examples.ids_N_S.shape) * reading.examples.label_N_S
    labels = torch.rand(*token_N_S.shape, 512)
    credits, moved = reading.to_completions(result_of(token_N_S, labels))
    assert torch.equal(credits, token_N_S[:, 1:])
    assert moved is not None
    assert torch.equal(moved, labels[:, 1:])
    cut = read_completions(rollout, model, model, max_length=5)
    credits, moved = cut.to_completions(result_of(token_N_S[:, :5], labels[:, :5]))
    assert credits.shape == rollout.ids_N_K.shape
    assert torch.equal(credits[:, :4], token_N_S[:, 1:5])
    assert not bool(credits[:, 4:].any())
    assert moved is not None
    assert moved.shape == (*credits.shape, 512)


FIRST = trained_bpe(world.sentences("train", "es", 200, seed=0), 400, SPECIALS, bos="<s>", eos="<e>")
SECOND = trained_bpe(world.sentences("train", "de", 200, seed=0), 290, ["<|x|>"], bos=None, eos="<|x|>")


def metaspace() -> PreTrainedTokenizerFast:
    """A tokeniser that is not byte-level: spaces become ▁ and decode to spaces, and one stands before the text."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz.é", "▁a", "▁the", "th", "<u>"]
    vocab = {token: number for number, token in enumerate([*letters, "▁t", "▁th"])}
    tokenizer = Tokenizer(BPE(vocab, [("▁", "a"), ("t", "h"), ("▁", "th"), ("▁th", "e")], unk_token="<u>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoding.Metaspace()
    tokenizer.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<u>")


PIECES = metaspace()
PAIRS = [(FIRST, SECOND), (SECOND, FIRST), (FIRST, PIECES), (PIECES, FIRST), (WRITER, READER)]


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 4), st.integers(0, 2**32), st.integers(1, 40), st.booleans())
def test_credit_is_conserved_and_causal(pair: int, seed: int, length: int, finished: bool) -> None:
    first, second = PAIRS[pair]
    rng = random.Random(seed)
    row = [rng.randrange(len(first)) for _ in range(length)]
    row = [token for token in row if token != first.eos_token_id] + ([first.eos_token_id] if finished else [])
    if not row:
        return
    writer, reader = model_of(first), model_of(second)
    reading = read_completions(rollout_of([row]), writer, reader)
    generator = torch.Generator().manual_seed(seed)
    token_N_S = torch.randn(reading.examples.ids_N_S.shape, generator=generator, dtype=torch.float64)
    token_N_S = token_N_S * reading.examples.label_N_S
    credits = reading.collect(token_N_S)
    assert credits.shape == (1, len(row))
    assert abs(float(credits.sum() - token_N_S.sum())) < 1e-12
    places = reading.place_N_S[0][reading.examples.label_N_S[0]].tolist()
    assert places == sorted(places)
    assert all(0 <= place < len(row) for place in places)
    if finished and len(places) > 1:
        assert places[-1] == len(row) - 1 > places[-2]
    # the credited token is the first with which the target token's last character stands
    content = row[:-1] if finished else row
    text = first.decode(content, skip_special_tokens=True)
    ((_, last),) = encode_with_ends(second, [text])
    for place, character in zip(reading.place_N_S[0, int(reader.bos_id is not None) :].tolist(), last, strict=False):
        if place >= 0:
            assert first.decode(content[: place + 1], skip_special_tokens=True).startswith(text[: character + 1])
            if "\ufffd" not in text:
                before = first.decode(content[:place], skip_special_tokens=True)
                assert len(before.rstrip("\ufffd")) <= character
    again = read_completions(rollout_of([row]), writer, reader)
    assert torch.equal(again.examples.ids_N_S, reading.examples.ids_N_S)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40), st.sampled_from([FIRST, SECOND, WRITER]))
def test_ends_of_real_text_are_those_of_decoded_prefixes(text: str, tokenizer: PreTrainedTokenizerFast) -> None:
    text = text.encode("utf-8", "ignore").decode().replace("\ufffd", "")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ((decoded, ends),) = decode_with_ends(tokenizer, [ids])
    assert decoded == text
    prefixes = [tokenizer.decode(ids[: place + 1]).rstrip("\ufffd") for place in range(len(ids))]
    assert ends == [len(prefix) for prefix in prefixes]
    ((again, last),) = encode_with_ends(tokenizer, [text])
    assert again == ids
    # a token that holds a part of a character ends in it
    expected = [end - 1 if text[:end] == tokenizer.decode(ids[: n + 1]) else end for n, end in enumerate(ends)]
    assert last == expected


def test_pieces_that_are_not_byte_level() -> None:
    ids = PIECES.convert_tokens_to_ids(["▁the", "▁a", "b", "é"])
    ((text, ends),) = decode_with_ends(PIECES, [ids])
    assert (text, ends) == ("the abé", [3, 5, 6, 7])
    ((again, last),) = encode_with_ends(PIECES, [text])
    assert again == ids
    assert last == [2, 4, 5, 6]


def test_agreement_by_hand(tmp_path) -> None:
    writer, reader = model_of(WRITER), model_of(READER)
    found = agreement(writer, reader, ["llo world"])
    # written l lo Ġ wor ld, ends 0 2 3 6 8; read ll o Ġwor l d, ends 1 2 6 7 8: three of five
    assert found.aligned == pytest.approx(3 / 5)
    assert found.tokens_ratio == 1.0
    assert found.lossless == 1.0
    assert 0.9 < found.vocabulary < 1
    assert "two tokenisers" in found.as_text()
    assert agreement(writer, writer, ["x"]).as_text() == "one tokeniser"


def test_attribution_across_tokenisers_keeps_each_examples_reward(tmp_path) -> None:
    """The whole of `attribute`, on checkpoints of two architectures."""
    from dpg_cli.driver.build import build
    from dpg_cli.engine.generator.rollout import sample
    from dpg_cli.engine.loop import attribute
    from dpg_cli.settings.config import validate

    save_instruct_llama(tmp_path / "llama")
    save_gpt2(tmp_path / "gpt2")
    config = validate(
        {
            "models": {"generator": str(tmp_path / "llama"), "target": str(tmp_path / "gpt2"), "dtype": "float64"},
            "metric": {"name": "norm"},
            "prompts": {"per_step": 3},
            "credit": {"mode": "token"},
            "rollout": {"max_tokens": 12},
            "inner": {"eps": 1e-3},
        }
    )
    built = build(config)
    assert not built.tokenizers.shared
    players, spec = built.players, built.spec
    rollout = sample(
        players.generator.model, players.generator.tokenizer, built.prompts.at(0), spec.sampling, players.rng
    )
    result, token_N_K, labels = attribute(players, spec, rollout)
    assert labels is None
    assert token_N_K.shape == rollout.ids_N_K.shape
    assert float(result.example_N.abs().min()) > 0
    assert float((token_N_K.sum(1) - result.example_N).abs().max() / result.example_N.abs().max()) < 1e-12
    assert not bool(token_N_K[~rollout.mask_N_K].any())
    with pytest.raises(ValueError, match="one tokeniser"):
        attribute(players, replace(spec, credit="expected"), rollout)
