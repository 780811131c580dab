"""The library's doors: what examples, optimisers, weights and metrics are taken as, and what is refused in one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from builders import CHAT_TEMPLATE, byte_bpe, make_target
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import Dataset, TensorDataset
from transformers import BatchEncoding, DataCollatorForSeq2Seq
from zoo.judge import HeldOut, judge, rows
from zoo.tiny import PAD, tiny_model

from dpg_cli.engine import Examples, Metagradient, OptimizerSpec, metagradient
from dpg_cli.engine.attribution import InnerSettings, effect
from dpg_cli.errors import DegenerateError, DpgError, UsageError

SPEC = OptimizerSpec("adamw", lr=0.02, beta1=0.8, beta2=0.95, eps=0.03, weight_decay=0.1)
METRIC = HeldOut(rows(3, 5))
SEQUENCES = [[3, 4, 2, 5], [6, 7], [8, 2, 9, 10, 11]]


def attribution(model: nn.Module, examples: Any, **options: Any) -> Metagradient:
    options = {"optimizer": SPEC, "metric": METRIC, "batch_size": 3, **options}
    return metagradient(model, examples, **options)


def relative(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


def same(first: Examples, second: Examples) -> bool:
    return all(
        torch.equal(getattr(first, name), getattr(second, name)) for name in ("ids_N_S", "attention_N_S", "label_N_S")
    )


def left(examples: Examples) -> Examples:
    """The same rows, padded on the left."""
    width = examples.ids_N_S.shape[1]
    lengths = examples.attention_N_S.sum(1, keepdim=True)
    places = (torch.arange(width) - (width - lengths)) % width
    return Examples(
        *(part.gather(1, places) for part in (examples.ids_N_S, examples.attention_N_S, examples.label_N_S))
    )


# what a row is


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "bloom", "rwkv", "mpt"])  # positions of all kinds
@pytest.mark.parametrize("labels", [False, True])
def test_rows_padded_on_the_left_are_the_same_rows(name: str, labels: bool) -> None:
    right = rows(6, 0)
    padded = left(right)
    assert not bool(padded.attention_N_S[0, 0])
    model = tiny_model(name)
    expected, found = attribution(model, right, labels=labels), attribution(model, padded, labels=labels)
    assert found.value == expected.value
    assert torch.equal(found.example_N, expected.example_N)
    assert bool((found.token_N_S[~padded.label_N_S] == 0).all())
    assert torch.equal(found.token_N_S[padded.attention_N_S], expected.token_N_S[right.attention_N_S])
    if labels:
        assert found.label_N_S_V is not None and expected.label_N_S_V is not None
        assert torch.equal(found.label_N_S_V[padded.attention_N_S], expected.label_N_S_V[right.attention_N_S])
    inner = InnerSettings(SPEC, 3)
    assert effect(model, padded, METRIC, inner).value == effect(model, right, METRIC, inner).value


def test_rows_padded_on_either_side_stand_in_one_batch() -> None:
    right = rows(6, 0)
    other = left(right)
    mixed = Examples(
        *(
            torch.cat([getattr(right, name)[:3], getattr(other, name)[3:]])
            for name in ("ids_N_S", "attention_N_S", "label_N_S")
        )
    )
    model = tiny_model("gpt2")
    assert torch.equal(attribution(model, mixed).example_N, attribution(model, right).example_N)


T, F = True, False
WRONG_ROWS = {
    "a hole": (([[3, 4, 0, 5]], [[T, T, F, T]], [[F, T, F, T]]), "Row 0 has padding between its tokens"),
    "two rows in one": (([[3, 4, 0, 5, 6]], [[T, T, F, T, T]], [[F, T, F, F, T]]), "padding between its tokens"),
    "a label on padding": (([[3, 4, 0]], [[T, T, F]], [[F, T, T]]), "label on padding"),
    "a label at first": (([[3, 4, 5]], [[T, T, T]], [[T, T, T]]), "label on its first token"),
    "a label at first, on the left": (([[0, 4, 5]], [[F, T, T]], [[F, T, T]]), "label on its first token"),
    "other shapes": (([[3, 4]], [[T, T, T]], [[F, T, T]]), r"\(N, S\) shape"),
}


@pytest.mark.parametrize("kind", WRONG_ROWS)
def test_rows_that_no_causal_run_reads_are_refused(kind: str) -> None:
    parts, cause = WRONG_ROWS[kind]
    with pytest.raises(ValueError, match=cause) as caught:
        Examples(*(torch.tensor(part) for part in parts))
    assert isinstance(caught.value, DpgError)


def test_float_ids_are_refused() -> None:
    marks = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(TypeError, match="integers"):
        Examples(torch.ones(1, 2), marks, torch.tensor([[F, T]]))


# where rows come from


def test_prefixes_one_a_row() -> None:
    examples = Examples.from_sequences(SEQUENCES, prefix=[2, 1, 4])
    assert examples.label_N_S.tolist() == [[F, F, T, T, F], [F, T, F, F, F], [F, F, F, F, T]]
    assert same(Examples.from_sequences(SEQUENCES, prefix=[1, 1, 1]), Examples.from_sequences(SEQUENCES))
    with pytest.raises(ValueError, match="2 prefixes for 3"):
        Examples.from_sequences(SEQUENCES, prefix=[1, 1])
    for empty in ([], [[1], []]):
        with pytest.raises(ValueError, match="at least one token"):
            Examples.from_sequences(empty)


class Rows(Dataset):  # without __iter__, as most are
    def __init__(self, entries: list[Any]) -> None:
        self.entries = entries

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, number: int) -> Any:
        return self.entries[number]


def labelled(sequence: list[int]) -> dict[str, list[int]]:
    return {"input_ids": sequence, "labels": [-100, *sequence[1:]], "attention_mask": [1] * len(sequence)}


def test_datasets_lists_and_batches_are_the_same_rows() -> None:
    expected = Examples.from_sequences(SEQUENCES)
    datasets_ = pytest.importorskip("datasets")
    entries = [labelled(sequence) for sequence in SEQUENCES]
    padded = [
        {"input_ids": [*ids, *[0] * (5 - len(ids))], "attention_mask": [1] * len(ids) + [0] * (5 - len(ids))}
        for ids in SEQUENCES
    ]
    for dataset in (
        SEQUENCES,
        [torch.tensor(sequence) for sequence in SEQUENCES],
        [{"input_ids": sequence} for sequence in SEQUENCES],
        entries,
        [BatchEncoding(entry) for entry in entries],
        Rows(entries),
        padded,
        datasets_.Dataset.from_list(entries),
    ):
        assert same(Examples.from_dataset(dataset), expected)
    assert same(Examples.from_batch({"input_ids": SEQUENCES}), expected)
    whole = {key: torch.tensor([entry[key] for entry in padded]) for key in padded[0]}
    assert same(Examples.from_batch(BatchEncoding(whole)), expected)
    positions = (whole["attention_mask"].cumsum(1) - 1).clamp(min=0)
    extra = {"position_ids": positions, "token_type_ids": torch.zeros_like(positions)}
    assert same(Examples.from_batch(whole | extra), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_a_collator_gives_trains_what_the_trainer_trains(side: str) -> None:
    """Φ and its metagradient of a collated batch: its labels decide, wherever it is padded."""
    tokenizer = byte_bpe([], ["<end>"], bos="<end>", eos="<end>")
    tokenizer.pad_token, tokenizer.padding_side = "<end>", side
    masked = [{"input_ids": ids, "labels": [-100, -100, *ids[2:]]} for ids in SEQUENCES]
    batch = DataCollatorForSeq2Seq(tokenizer)(masked)
    examples = Examples.from_batch(batch)
    trained = batch["labels"] != -100
    assert torch.equal(examples.label_N_S, trained)
    expected = Examples.from_sequences(SEQUENCES, prefix=2)
    assert same(Examples(*(part for part in _aligned(examples))), expected)


def _aligned(examples: Examples) -> tuple[Tensor, Tensor, Tensor]:
    found = examples.aligned()
    return found.ids_N_S.masked_fill(~found.attention_N_S, 0), found.attention_N_S, found.label_N_S


def batch_of(**changes: Any) -> dict[str, Any]:
    ids = [[3, 4, 5, 6]]
    return {"input_ids": torch.tensor(ids)} | {key: torch.tensor(value) for key, value in changes.items()}


WRONG_BATCHES = {
    "packed": (batch_of(position_ids=[[0, 1, 0, 1]]), "several examples are packed"),
    "positions of its own": (batch_of(position_ids=[[5, 6, 7, 8]]), "positions of their own"),
    "positions of padding on the left": (
        batch_of(attention_mask=[[0, 0, 1, 1]], position_ids=[[0, 1, 2, 3]]),
        "positions of their own",
    ),
    "token types": (batch_of(token_type_ids=[[0, 0, 1, 1]]), "token_type_ids are not all 0"),
    "shifted labels": (batch_of(labels=[[4, 5, 6, -100]]), "labels are the tokens themselves"),
    "a hole": (batch_of(attention_mask=[[1, 0, 1, 1]]), "padding between its tokens"),
    "pictures": (batch_of(pixel_values=[[0.0]]), "pixel_values"),
    "lengths of parts": (batch_of(cu_seq_lens_q=[0, 2, 4]), "cu_seq_lens_q"),
    "another shape": (batch_of(labels=[[3, 4, 5]]), "shape"),
}


@pytest.mark.parametrize("kind", WRONG_BATCHES)
def test_batches_whose_meaning_would_be_lost_are_refused(kind: str) -> None:
    batch, cause = WRONG_BATCHES[kind]
    with pytest.raises(ValueError, match=cause):
        Examples.from_batch(batch)


def test_what_is_no_batch_or_dataset_is_refused_by_row() -> None:
    for make, cause in (
        (lambda: Examples.from_batch([1, 2]), "takes a mapping"),
        (lambda: Examples.from_batch({"text": "a"}), "no input_ids; it has text"),
        (lambda: Examples.from_batch({"input_ids": [["a", "b"]]}), "no array of integers"),
        (lambda: Examples.from_batch({"input_ids": [[0.5, 1.0]]}), "float32, not integers"),
        (lambda: Examples.from_dataset([[3, 4], "text"]), "Row 1 of the data set is a str"),
        (lambda: Examples.from_dataset([{"text": "a"}]), "Row 0 of the data set has no input_ids"),
    ):
        with pytest.raises(TypeError, match=cause):
            make()
    with pytest.raises(ValueError, match="Row 1 of the data set: labels"):
        Examples.from_dataset([labelled([3, 4]), {"input_ids": [3, 4], "labels": [-100, 9]}])


MARKED = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|eot|>{% endgeneration %}{% else %}{{ message['content'] }}<|eot|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
TALK = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi there"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "bye"},
]
SPECIALS = ["<|begin|>", "<|end|>", "<|start|>", "<|eot|>"]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED], ids=["by turns", "by marks"])
def test_messages_train_the_assistants_turns(template: str) -> None:
    tokenizer = byte_bpe([], SPECIALS, bos="<|begin|>", eos="<|end|>", chat=template)
    options = {"date_string": "1 May"}
    examples = Examples.from_messages(tokenizer, [TALK, {"messages": TALK[:2]}], **options)
    whole = tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=True, **options)["input_ids"]
    assert examples.ids_N_S[0].tolist() == whole
    assert int(examples.attention_N_S[1].sum()) < len(whole)
    trained = [tokenizer.decode(examples.ids_N_S[row][examples.label_N_S[row]]) for row in (0, 1)]
    assert trained == ["hi there<|eot|>bye<|eot|>", "hi there<|eot|>"]


def test_messages_that_cannot_be_split_are_refused() -> None:
    plain = byte_bpe([], SPECIALS, bos="<|begin|>", eos="<|end|>")
    with pytest.raises(ValueError, match="no chat template"):
        Examples.from_messages(plain, [TALK])
    last = "{% for message in messages %}{% if loop.last %}{{ message['content'] }}{% else %}.{% endif %}{% endfor %}"
    changing = byte_bpe([], SPECIALS, bos="<|begin|>", eos="<|end|>", chat=last)
    with pytest.raises(ValueError, match="changes what stands before turn 1"):
        Examples.from_messages(changing, [TALK])
    with pytest.raises(TypeError, match="Conversation 0 is no list of messages"):
        Examples.from_messages(changing, ["hello"])


# the other arguments

WRONG_ARGUMENTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a torch optimiser": (
        {"optimizer": lambda model: torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95))},
        TypeError,
        r"torch.optim.AdamW, not an OptimizerSpec. .*OptimizerSpec\('adamw', lr=0.0003, beta1=0.9, beta2=0.95",
    ),
    "a torch SGD": (
        {"optimizer": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)},
        TypeError,
        r"OptimizerSpec\('sgd', lr=0.1, momentum=0.9\)",
    ),
    "an optimiser's class": ({"optimizer": lambda model: torch.optim.Adam}, TypeError, r"class \(Adam\)"),
    "an optimiser's name": ({"optimizer": lambda model: "adamw"}, TypeError, "is a str"),
    "short weights": ({"weights_N": lambda model: torch.ones(2)}, ValueError, r"shape \(2,\) for 3 examples"),
    "square weights": ({"weights_N": lambda model: torch.ones(3, 1)}, ValueError, r"shape \(3, 1\)"),
    "a list of weights": ({"weights_N": lambda model: [1.0, 1.0, 1.0]}, TypeError, "not a tensor"),
    "weights that are no numbers": ({"weights_N": lambda model: torch.tensor([1, torch.nan, 1])}, ValueError, "finite"),
    "a token beyond": (
        {"examples": lambda model: Examples.from_sequences([[3, 4], [5, 29]])},
        ValueError,
        "Token 1 of row 1 is 29; the model has 29 tokens",
    ),
    "a negative token": (
        {"examples": lambda model: Examples.from_sequences([[3, -1, 4]])}, ValueError, "Token 1 of row 0 is -1",
    ),
    "a batch": ({"examples": lambda model: {"input_ids": [[1]]}}, TypeError, "Examples.from_batch"),
    "lists": ({"examples": lambda model: SEQUENCES}, TypeError, "Examples.from_sequences"),
    "messages": ({"examples": lambda model: [TALK]}, TypeError, "Examples.from_messages"),
    "a data set": ({"examples": lambda model: TensorDataset(torch.ones(1, 1))}, TypeError, "Examples.from_dataset"),
    "nothing": ({"examples": lambda model: Examples.from_sequences([[3]]).rows(0, 0)}, ValueError, "no example"),
    "a metric's class": ({"metric": lambda model: HeldOut}, TypeError, "the class HeldOut"),
    "a number": ({"metric": lambda model: 3.0}, TypeError, "a float, which cannot be called"),
    "three arguments": ({"metric": lambda model: lambda a, b, c: a}, TypeError, "takes 3 arguments"),
    "a float metric": ({"metric": lambda model: lambda parameters, model: 1.0}, TypeError, "not a tensor"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG_ARGUMENTS)
def test_an_argument_that_cannot_be_meant_gives_one_clear_error(kind: str) -> None:
    given, error, cause = WRONG_ARGUMENTS[kind]
    model = make_target("gpt2", tied=True)
    made = {name: make(model) for name, make in given.items()}
    examples = made.pop("examples", Examples.from_sequences(SEQUENCES))
    with pytest.raises(error, match=cause) as caught:
        attribution(model, examples, **made)
    assert isinstance(caught.value, UsageError)
    assert len(str(caught.value).splitlines()) == 1


def test_padding_may_hold_anything() -> None:
    examples = Examples.from_sequences(SEQUENCES)
    odd = Examples(
        examples.ids_N_S.masked_fill(~examples.attention_N_S, -100), examples.attention_N_S, examples.label_N_S
    )
    model = make_target("gpt2", tied=True)
    assert torch.equal(attribution(model, odd).token_N_S, attribution(model, examples).token_N_S)


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(UsageError, match=r"trainable parameter|frozen"):
        attribution(make_target("gpt2", tied=True).requires_grad_(False), rows(3, 0))


# metrics


def by_parameters(parameters: Mapping[str, Tensor], model: nn.Module) -> Tensor:
    """A held-out loss, negated."""
    return METRIC(parameters, model)


def by_model(parameters: Mapping[str, Tensor], model: nn.Module) -> Tensor:
    rows_ = METRIC.rows
    logits = model(input_ids=rows_.ids_N_S, use_cache=False).logits[:, :-1]
    losses = nn.functional.cross_entropy(logits.mT, rows_.ids_N_S[:, 1:], reduction="none")
    mask = rows_.label_N_S[:, 1:]
    return -(losses * mask).sum() / mask.sum()


def by_model_alone(model: nn.Module) -> Tensor:
    return by_model({}, model)


def by_both(parameters: Mapping[str, Tensor], model: nn.Module) -> Tensor:
    return 0.25 * by_model(parameters, model) + 0.75 * by_parameters(parameters, model)


def by_parts(model: Any) -> Tensor:
    hidden = model.transformer(input_ids=METRIC.rows.ids_N_S).last_hidden_state
    logits = nn.functional.linear(hidden, model.get_parameter("transformer.wte.weight"))[:, :-1]
    losses = nn.functional.cross_entropy(logits.mT, METRIC.rows.ids_N_S[:, 1:], reduction="none")
    mask = METRIC.rows.label_N_S[:, 1:]
    return -(losses * mask).sum() / mask.sum()


@pytest.mark.parametrize("metric", [by_parameters, by_model, by_model_alone, by_both, by_parts])
def test_every_way_to_read_the_weights_is_the_same_metric(metric: Any) -> None:
    model = make_target("gpt2", tied=True)
    before = list(model.parameters())
    expected, found = attribution(model, rows(6, 0)), attribution(model, rows(6, 0), metric=metric)
    assert relative(found.token_N_S, expected.token_N_S) < 1e-12
    assert found.value == pytest.approx(expected.value, rel=1e-12)
    assert found.measures == {"phi": pytest.approx(expected.value, rel=1e-12)}
    assert all(one is other for one, other in zip(model.parameters(), before, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    inner = InnerSettings(SPEC, 3)
    assert effect(model, rows(6, 0), expected_metric(metric), inner).value == pytest.approx(expected.value, rel=1e-12)


def expected_metric(metric: Any) -> Any:
    from dpg_cli.metrics.base import as_metric

    return as_metric(metric)


def test_a_metric_of_the_model_agrees_with_the_stock_run() -> None:
    """The padding row's derivative through Φ too, which autograd would cut."""
    model = tiny_model("llama")
    assert judge(model).error < 1e-6
    assert bool((METRIC.rows.ids_N_S[:, :-1] == PAD).any())
    expected = attribution(model, rows(6, 0))
    assert relative(attribution(model, rows(6, 0), metric=by_model_alone).token_N_S, expected.token_N_S) < 1e-12


ELSEWHERE: dict[str, Any] = {
    "another copy": lambda other: lambda parameters, model: by_model({}, other),
    "its own tensors": lambda other: lambda parameters, model: other.transformer.wte.weight.sum(),
    "detached": lambda other: lambda parameters, model: by_model({}, model).detach(),
    "a constant": lambda other: lambda parameters, model: torch.tensor(1.0, requires_grad=True) * 2,
}


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_a_metric_that_does_not_see_the_weights_is_refused(kind: str) -> None:
    """Today's scores for these are zeros, without a word."""
    metric = ELSEWHERE[kind](make_target("gpt2", tied=True, seed=1))
    with pytest.raises(DegenerateError, match="does not depend on the"):
        attribution(make_target("gpt2", tied=True), rows(6, 0), metric=metric)


def test_a_metric_that_is_flat_is_no_fault() -> None:
    metric = lambda parameters, model: torch.relu(by_model(parameters, model) - 5)  # noqa: E731
    assert bool((attribution(make_target("gpt2", tied=True), rows(6, 0), metric=metric).token_N_S == 0).all())


def test_the_untouched_target_is_no_longer_where_it_was() -> None:
    """model(...) under no_grad once gave θ_0; now that it carries θ_T, that is refused instead of changed silently."""

    def change(parameters: Mapping[str, Tensor], model: nn.Module) -> Tensor:
        with torch.no_grad():
            before = model(input_ids=METRIC.rows.ids_N_S).logits
        after = functional_call(model, dict(parameters), (), {"input_ids": METRIC.rows.ids_N_S}).logits
        return (after - before).square().mean()

    with pytest.raises(UsageError, match="carries the weights after fine-tuning"):
        attribution(make_target("gpt2", tied=True), rows(6, 0), metric=change)


def test_a_result_is_shown_on_three_lines() -> None:
    result = attribution(make_target("gpt2", tied=True), rows(6, 0), labels=True)
    lines = repr(result).splitlines()
    assert len(lines) == 3
    assert f"{result.value:.6g}" in lines[0]
    assert "6 rewards" in lines[1] and "(6, 8, 29)" in lines[1]
    assert f"{sum(value.numel() for value in result.final.values())} weights" in lines[2]
    assert all(len(line) < 200 for line in lines)
    assert repr(rows(6, 0)) == "Examples(6 rows of up to 8 tokens; 39 real, 33 trained; cpu)"
