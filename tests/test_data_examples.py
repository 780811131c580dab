"""Rows as tokens: equal to TRL's own preparation, with the same mask; seams, cutting, conversations, dates, strange ids."""

from __future__ import annotations

import contextlib
import gc
import json
import tracemalloc
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from builders import CHAT_TEMPLATE
from stock_sft import prepared
from tokenisers import MARKED, TOKENISERS, reader, tokeniser

from dpg_cli.data.conversations import ChatTemplate, dated
from dpg_cli.data.examples import Encoding, RowEncoder, padded
from dpg_cli.data.prepared import Prepared, gather, gathered_items, prepare
from dpg_cli.data.shapes import Asked, Chat, Item, Pair, Text
from dpg_cli.data.tokens import TokenRows, Tokens
from dpg_cli.engine import Examples
from dpg_cli.errors import UsageError

Rows = list[dict[str, Any]]


def ours(rows: Rows, tokenizer: Any, place: Path, how: Encoding | None = None, **target: Any) -> Prepared:
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prepare(gather(str(place / "rows.jsonl")), RowEncoder(reader(tokenizer, **target), how))


def encoded(tokenizer: Any, *items: Item, how: Encoding | None = None, **target: Any) -> list[Tokens]:
    return list(prepare(gathered_items(items, "here"), RowEncoder(reader(tokenizer, **target), how)).rows)


def fault(what: str, remedy: str = "") -> UsageError:
    return UsageError(what, remedy)


PAIRS: Rows = [
    {"prompt": "the cat", "completion": " sees a boat"},
    {"prompt": "", "completion": "hello there"},
    {"prompt": "the cat\n", "completion": "sees a boat</s>"},
    {"prompt": "the cat", "completion": ""},
    {"prompt": "hello 😀", "completion": " é\u0301 fine\n\n"},
]
SEAMS: Rows = [  # a token of the whole may hold characters of both
    {"prompt": "the cat ", "completion": "sees a boat"},
    {"prompt": "the ca", "completion": "t"},
    {"prompt": "hello e", "completion": "\u0301 fine"},
    {"prompt": "a\n", "completion": "\nb"},
]
TALKS: Rows = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "fine"}]},
    {
        "messages": [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "hi\nyou"},
            {"role": "user", "content": "and?"},
            {"role": "assistant", "content": "two  blanks "},
            {"role": "user", "content": "bye"},
        ]
    },
]
FAST = [name for name in TOKENISERS if name != "slow bytes"]


@pytest.mark.parametrize("name", TOKENISERS)
def test_texts_and_pairs_are_those_of_stock_fine_tuning(name: str, tmp_path: Path) -> None:
    tokenizer = tokeniser(name)
    found = ours(PAIRS, tokenizer, tmp_path)
    assert [(row.ids, row.label) for row in found.rows] == prepared(PAIRS, tokenizer)
    assert any(any(row.label) and not all(row.label[1:]) for row in found.rows)
    texts = [{"text": row["prompt"] + row["completion"]} for row in PAIRS]
    assert [(row.ids, row.label) for row in ours(texts, tokenizer, tmp_path).rows] == prepared(texts, tokenizer)


@pytest.mark.parametrize("name", TOKENISERS)
def test_at_a_seam_the_ids_are_the_stock_ones_and_the_mask_goes_by_characters(name: str, tmp_path: Path) -> None:
    tokenizer = tokeniser(name)
    found = ours(SEAMS, tokenizer, tmp_path)
    assert found.understood.straddling == sum(row.straddles for row in found.rows)
    assert f"{found.understood.straddling} rows have a token across the seam" in " ".join(
        [*found.understood.notes(), "0 rows have a token across the seam", "1 rows have a token across the seam"]
    )
    for row, mine, (ids, label) in zip(SEAMS, found.rows, prepared(SEAMS, tokenizer), strict=True):
        assert mine.ids == ids
        alone = tokenizer(row["prompt"])["input_ids"]
        alone = alone[:-1] if alone and alone[-1] == tokenizer.eos_token_id else alone
        first = mine.label.index(True)
        assert mine.straddles == (ids[:first] != alone)
        assert all(mine.label[first:])
        if not mine.straddles:
            assert mine.label == label
        else:  # TRL begins where the tokens first differ, which is at the straddling token or before it
            assert label.index(True) <= first


def test_a_straddling_token_is_trained_on_and_counted() -> None:
    tokenizer = tokeniser("bytes")
    apart, joined = encoded(tokenizer, Pair("the cat", " sees"), Pair("the cat ", "sees"))
    assert (apart.ids, apart.straddles, joined.straddles) == (joined.ids, False, True)
    assert apart.label == joined.label
    assert tokenizer.decode([i for i, bit in zip(joined.ids, joined.label, strict=True) if bit]) == " sees</s>"


@pytest.mark.parametrize("keep", ["start", "end"])
@pytest.mark.parametrize("longest", [3, 6, 9])
@pytest.mark.parametrize("name", ["bytes", "bytes, a beginning and an end"])
def test_what_is_cut_is_what_stock_fine_tuning_cuts(name: str, longest: int, keep: Any, tmp_path: Path) -> None:
    tokenizer = tokeniser(name)
    found = ours(PAIRS, tokenizer, tmp_path, Encoding(max_length=longest, keep=keep))
    left = [(row.ids, row.label) for row in found.rows if any(row.label)]
    wanted = [row for row in prepared(PAIRS, tokenizer, max_length=longest, keep=keep) if any(row[1])]
    assert left == wanted
    whole = [len(row.ids) for row in ours(PAIRS, tokenizer, tmp_path).rows]
    assert [row.cut for row in found.rows] == [max(0, size - longest) for size in whole]
    assert found.understood.cut == sum(size > longest for size in whole)
    assert found.understood.untrained == len(PAIRS) - len(left)
    assert len(found.trained) == len(left)


def test_the_targets_context_cuts_too_and_rows_without_a_trained_token_are_refused(tmp_path: Path) -> None:
    tokenizer, rows = tokeniser("bytes"), [{"prompt": "the old cat " * 9, "completion": "fine"}]
    found = ours(rows, tokenizer, tmp_path, context=12)
    assert (len(found.rows[0].ids), list(found.trained)) == (12, [])
    assert [note for note in found.understood.notes() if "nothing left to train on" in note]
    encoder = RowEncoder(reader(tokenizer, context=12))
    with pytest.raises(UsageError, match="has a token to train on"):
        found.tensors(encoder)
    kept = ours(rows, tokenizer, tmp_path, Encoding(keep="end"), context=12)
    ids, attention, label = kept.tensors(encoder)
    assert (ids.shape, int(label.sum())) == ((1, 12), sum(kept.rows[0].label))
    assert int(label.sum()) > 0
    Examples(ids, attention, label)


def test_batches_are_padded_at_the_right() -> None:
    rows = TokenRows([Tokens([5, 6, 7], [False, False, True], ""), Tokens([], [], ""), Tokens([8], [False], "")])
    ids, attention, label = padded(rows, reader(tokeniser("bytes")), [0, 2])
    assert attention.tolist() == [[True, True, True], [True, False, False]]
    assert label.tolist() == [[False, False, True], [False, False, False]]
    assert ids[0].tolist() == [5, 6, 7]
    assert ids.dtype == torch.int64


def test_packed_rows_are_the_rows() -> None:
    """Whatever a row holds comes back; a slice is a list; lengths and counts are those of the rows."""
    rows = [
        Tokens([5, 70_000, 7], [False, True, True], "café \ud800", straddles=True),
        Tokens([], [], ""),
        Tokens([8], [False], "\U0001f40e", cut=4),
    ]
    packed = TokenRows(rows)
    assert list(packed) == rows
    assert packed[1:] == rows[1:]
    assert (packed[-1], len(packed), packed.longest) == (rows[2], 3, 5)
    assert (packed.lengths.tolist(), packed.trained.tolist()) == ([3, 0, 1], [2, 0, 0])
    with pytest.raises(IndexError):
        packed[3]


def test_a_question_takes_the_form_that_the_tokeniser_has() -> None:
    tokenizer = tokeniser("bytes, a beginning")
    talk = Chat([{"role": "user", "content": "do\n\nit"}, {"role": "assistant", "content": "done"}], 1)
    assert encoded(tokenizer, Asked("do\n\nit", "done")) == encoded(tokenizer, talk)
    bare = tokeniser("slow bytes")
    template, bare.chat_template = bare.chat_template, None
    try:
        assert encoded(bare, Asked("do\n\nit", "done")) == encoded(bare, Pair("do\n\nit\n\n", "done"))
        with pytest.raises(UsageError, match="conversations, and the tokeniser of 'small' has no chat template"):
            encoded(bare, talk)
    finally:
        bare.chat_template = template


# Conversations


@pytest.mark.parametrize("name", FAST)
def test_conversations_are_those_of_stock_fine_tuning(name: str, tmp_path: Path) -> None:
    """By the template's marks; and the same by comparing renderings, where the marks are taken out of it."""
    tokenizer = tokeniser(name)
    stock = prepared(TALKS, tokenizer)
    found = ours(TALKS, tokenizer, tmp_path)
    assert [(row.ids, row.label) for row in found.rows] == stock
    assert found.understood.turns == "marks"
    texts = [tokenizer.decode([i for i, bit in zip(ids, label, strict=True) if bit]) for ids, label in stock]
    assert "hi" in texts[1]
    assert "hello" not in texts[1]
    pairs = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in TALKS]
    assert [(row.ids, row.label) for row in ours(pairs, tokenizer, tmp_path).rows] == prepared(pairs, tokenizer)
    tokenizer.chat_template = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    try:
        compared = ours(TALKS, tokenizer, tmp_path)
    finally:
        tokenizer.chat_template = MARKED
    assert compared.understood.turns == "renderings"
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"][-1:]
    for (ids, label), row in zip(stock, compared.rows, strict=True):
        assert row.ids == ids  # the line's end that the template writes after a turn belongs to it
        assert {n for n, (a, b) in enumerate(zip(label, row.label, strict=True)) if a != b} <= {
            n for n, token in enumerate(ids) if [token] == newline or not tokenizer.decode([token]).strip()
        }


def test_what_of_a_conversation_is_trained_on(tmp_path: Path) -> None:
    tokenizer = tokeniser("bytes")

    def trained(how: Encoding) -> str:
        row = ours(TALKS[1:], tokenizer, tmp_path, how).rows[0]
        return tokenizer.decode([i for i, bit in zip(row.ids, row.label, strict=True) if bit])

    assert trained(Encoding()) == "hi\nyou<|end|>two  blanks <|end|>"
    assert trained(Encoding(train_on="last")) == "two  blanks <|end|>"
    assert trained(Encoding(train_on="all")).startswith("<|turn|>system\nbe kind")
    found = ours(TALKS[1:], tokenizer, tmp_path).understood
    assert (found.trained, found.context) == ("messages (the assistant's turns)", "the other turns")
    with pytest.raises(UsageError, match="line 1: there is no turn of the assistant to train on"):
        ours([{"messages": [{"role": "user", "content": "hi"}]}], tokenizer, tmp_path)


def templates() -> list[Path]:
    trl = pytest.importorskip("trl", reason="the extra `trl` is not installed")
    return sorted(Path(trl.__file__).parent.glob("chat_templates/*.jinja"))


@pytest.fixture
def any_special() -> Any:
    """A tokeniser to which every bracketed name is one token, as it is to the model of a template."""
    import copy
    import re

    def make(template: str) -> Any:
        names = re.findall(r"<\|?[｜a-zA-Z_▁]+?[|｜]?>|</s>|<turn\||<\|turn>|\[/?INST\]", template)
        tokenizer = copy.deepcopy(tokeniser("bytes"))
        tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(names))})
        tokenizer.chat_template = template
        return tokenizer

    return make


EQUAL = {  # templates whose turns TRL marks with the very characters that comparing renderings finds
    "cohere", "cohere2", "diffusion_gemma", "gemma3", "lfm2", "lfm2_v2", "llama3", "phi3", "phi3_5", "qwen2_5_vl",
    "qwen3_instruct_2507", "qwen3_vl",
}  # fmt: skip


def test_turns_of_the_templates_that_models_have(any_special: Any) -> None:
    """Every template that TRL knows: the contents and the end of each of the assistant's turns are trained on, and no others'
    contents; where TRL has a marked version that writes the same, its marks say the same."""
    messages = TALKS[1]["messages"]
    known = {path.stem: path.read_text(encoding="utf-8") for path in templates()}
    same, seen = set(), 0
    for name, template in known.items():
        if name.endswith("_training") or "raise_exception('System role not supported')" in template:
            continue
        seen += 1
        tokenizer = any_special(template)
        (row,) = encoded(tokenizer, Chat(messages))
        text = tokenizer.decode([i for i, bit in zip(row.ids, row.label, strict=True) if bit])
        assert text.count("hi\nyou") == text.count("two  blanks") == 1, name
        assert not [other for other in ("be kind", "hello", "and?", "bye") if other in text], name
        marked = known.get(f"{name}_training")
        if marked is None:
            continue
        with contextlib.suppress(jinja2.TemplateError):  # of one that reads contents as parts alone
            read = any_special(marked).apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            stock = [bool(bit) for bit in read["assistant_masks"]]
            same |= {name} if (row.ids, row.label) == (read["input_ids"], stock) else set()
    assert seen >= 25
    assert same == EQUAL


def test_a_template_that_writes_turns_differently_is_refused(tmp_path: Path) -> None:
    tokenizer = tokeniser("bytes")
    backwards = "{% for message in messages | reverse %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    upper = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] | upper }}\n{% endfor %}"
    failing = "{% for message in messages %}{{ message['content'] }}{% endfor %}{{ raise_exception('no such talk') }}"
    for template, words in (
        (backwards, "neither marks the assistant's turns"),
        (upper, "neither marks the assistant's turns"),
        (failing, "fails on it: no such talk"),
    ):
        tokenizer.chat_template = template
        try:
            with pytest.raises(UsageError, match=words) as caught:
                ours(TALKS, tokenizer, tmp_path)
        finally:
            tokenizer.chat_template = MARKED
        assert "\n" not in str(caught.value)


def test_marks_that_miss_a_turn_are_not_believed(tmp_path: Path) -> None:
    """transformers drops a span that begins with no token's character, and all after it: here none is lost."""
    tokenizer = tokeniser("bytes, trimmed offsets")
    talk = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": " fine"},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "you"},
    ]
    found = ours([{"messages": talk}], tokenizer, tmp_path).rows[0]
    text = tokenizer.decode([i for i, bit in zip(found.ids, found.label, strict=True) if bit])
    assert text.replace("\n", "") == " fine<|end|>you<|end|>"


def test_contents_reach_a_template_that_reads_parts_alone() -> None:
    tokenizer = tokeniser("bytes")
    tokenizer.chat_template = (
        "{% for message in messages %}<|turn|>{{ message['role'] }}\n"
        "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
    )
    try:
        (row,) = encoded(tokenizer, Chat(TALKS[0]["messages"]))
    finally:
        tokenizer.chat_template = MARKED
    assert tokenizer.decode(row.ids) == "<|turn|>user\nhi<|end|><|turn|>assistant\nfine<|end|>"
    assert row.text == "fine<|end|>"


DATES = {
    "a function": ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
    "within a macro": ("{% macro day() %}{{ strftime_now('%Y-%m-%d') }}{% endmacro %}{{ day() }}", "2024-07-26"),
    "if it is there": (
        "{% if strftime_now is defined %}{{ strftime_now('%A, %-d %B') }}{% endif %}",
        "Friday, 26 July",
    ),
    "kept": ("{%- set ns = namespace(d=strftime_now('%H:%M %j')) %}{{ ns.d }}", "00:00 208"),
    "a variable": ("{{ date_string }}", "26 Jul 2024"),
}


@pytest.mark.parametrize("name", DATES)
def test_a_template_never_sees_today(name: str, tmp_path: Path) -> None:
    template, shown = DATES[name]
    tokenizer = tokeniser("bytes")
    tokenizer.chat_template = f"  \n{template}\n{MARKED}"
    try:
        text = ChatTemplate(tokenizer, "x").render(TALKS[0]["messages"])
        found = ours(TALKS, tokenizer, tmp_path)
    finally:
        tokenizer.chat_template = MARKED
    plain = ChatTemplate(tokenizer, "x").render(TALKS[0]["messages"])
    assert "".join(text.split()) == "".join((shown + plain).split())
    assert found.understood.date == "26 Jul 2024"
    assert "is given 26 Jul 2024" in " ".join(found.understood.notes())
    assert ours(TALKS, tokenizer, tmp_path).understood.date == ""
    assert dated(MARKED) == MARKED


def test_options_and_tools_reach_the_template(tmp_path: Path) -> None:
    tokenizer = tokeniser("bytes")
    tokenizer.chat_template = "{{ tools | tojson }}{{ mood }}" + MARKED
    row = {**TALKS[0], "tools": json.dumps([{"name": "f"}]), "chat_template_kwargs": {"mood": "calm"}}
    try:
        found = ours([row], tokenizer, tmp_path)
        assert tokenizer.decode(found.rows[0].ids).startswith('[{"name": "f"}]calm')
        assert found.understood.left_out == ()
        assert [(r.ids, r.label) for r in found.rows] == prepared([row], tokenizer)
        with pytest.raises(UsageError, match="chat_template_kwargs may not set tokenize"):
            ours([{**row, "chat_template_kwargs": {"tokenize": False}}], tokenizer, tmp_path)
    finally:
        tokenizer.chat_template = MARKED


@pytest.mark.parametrize(
    "item", [Text("hi"), Pair("hi", "ho"), Chat(TALKS[0]["messages"]), Chat(TALKS[0]["messages"], 1)]
)
def test_ids_beyond_the_embedding_are_refused(item: Item) -> None:
    tokenizer = tokeniser("bytes")
    largest = max(encoded(tokenizer, item)[0].ids)
    encoded(tokenizer, item, rows=largest + 1)
    with pytest.raises(
        UsageError, match=rf"row 0: the tokeniser of 'small' gives token id {largest} \('.*'\), and its model"
    ):
        encoded(tokenizer, item, rows=largest)


def test_half_characters_of_a_template_are_refused() -> None:
    tokenizer = tokeniser("bytes")
    talk = Chat([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x", "extra": "\ud800"}])
    tokenizer.chat_template = MARKED.replace(
        "{{ message['content'] }}", "{{ message['content'] }}{{ message['extra'] }}"
    )
    try:
        with pytest.raises(UsageError, match="half a character"):
            encoded(tokenizer, talk)
    finally:
        tokenizer.chat_template = MARKED


def test_the_line_says_how_a_file_was_understood(tmp_path: Path) -> None:
    rows = [{"prompt": "the cat", "completion": " sees", "id": n, "url": ""} for n in range(3)]
    found = ours(rows, tokeniser("bytes"), tmp_path).understood
    trained, tokens = found.trained_tokens, found.tokens
    assert 0 < trained < tokens
    assert found.line() == (
        f"{tmp_path / 'rows.jsonl'}: 3 rows (JSON lines), trained: completion, context: prompt, "
        f"{trained} of {tokens} tokens count; not read: id, url"
    )
    assert found.notes() == []


def test_our_own_texts_begin_with_a_beginning(tmp_path: Path) -> None:
    tokenizer = tokeniser("bytes")
    (row,) = encoded(tokenizer, Text("the cat"), how=Encoding(begin=True))
    assert row.ids == [tokenizer.bos_token_id, *tokenizer("the cat")["input_ids"], tokenizer.eos_token_id]
    assert row.label == [False, *[True] * (len(row.ids) - 1)]
    (row,) = encoded(tokenizer, Pair("the", " cat"), how=Encoding(begin=True, end=False))
    assert tokenizer.decode([i for i, bit in zip(row.ids, row.label, strict=True) if bit]) == " cat"


def test_the_template_of_the_builders_is_compared(tmp_path: Path) -> None:
    tokenizer = tokeniser("bytes")
    tokenizer.chat_template = CHAT_TEMPLATE
    try:
        (row,) = ours(TALKS[:1], tokenizer, tmp_path).rows
    finally:
        tokenizer.chat_template = MARKED
    assert row.text == "fine<|eot|>"


def test_memory_of_many_short_rows(tmp_path: Path) -> None:
    """20,000 rows of six words: what is held of a row after reading and tokenising, and what is held at most."""
    words, count = ["the", "old", "cat", "takes", "a", "hat", "red", "house"], 20_000
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for number in range(count):
            text = " ".join(words[(number * k + k) % len(words)] for k in (1, 3, 5, 7, 11, 13))
            file.write(json.dumps({"text": text}) + "\n")
    encoder = RowEncoder(reader(tokeniser("bytes")))
    prepare(gather(str(path), limit=100), encoder)  # what is loaded once
    gc.collect()
    tracemalloc.start()
    found = prepare(gather(str(path)), encoder)
    gc.collect()
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found.rows) == count
    tokens = len(found.rows.ids) / count
    assert held / count < 5 * tokens * 1.2 + 150, (
        held / count,
        tokens,
    )  # arrays grow ahead of what they hold; text and places
    assert most / count < 1200, most / count  # with the rows of the source, which are let go
