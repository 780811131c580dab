"""Small tokenisers of the kinds that checkpoints have, each with what it does by itself, and targets that only read."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from builders import byte_level
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE, Unigram
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

TEXTS = [
    "the old cat sees a red boat in the garden now",
    "hello there, how are you? I am fine.",
    "  two  blanks\n\nlines",
] * 4
SPECIALS = ["<s>", "</s>", "<|turn|>", "<|end|>"]
MARKED = (  # a chat template with the marks that stock training looks for
    "{{ bos_token }}{% for message in messages %}<|turn|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


def _trained(model: Any, trainer: Any, **parts: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens([AddedToken(special, special=True, normalized=False) for special in SPECIALS])
    return tokenizer


def _wrapped(tokenizer: Tokenizer, single: str = "$A") -> PreTrainedTokenizerFast:
    ids = {name: tokenizer.token_to_id(name) for name in ("<s>", "</s>")}
    if single != "$A":
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=list(ids.items()))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<s>")
    fast.chat_template = MARKED
    return fast


def _bytes(single: str = "$A", *, trim: bool = True, regex: bool = True) -> PreTrainedTokenizerFast:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trim, use_regex=regex)
    own = _trained(BPE(), trainer, pre_tokenizer=split, decoder=decoders.ByteLevel())
    if single == "$A":
        own.post_processor = processors.ByteLevel(trim_offsets=trim)
    return _wrapped(own, single)


def _unigram() -> PreTrainedTokenizerFast:
    trainer = trainers.UnigramTrainer(vocab_size=120, show_progress=False, unk_token="<unk>", special_tokens=["<unk>"])
    own = _trained(
        Unigram(),
        trainer,
        pre_tokenizer=pre_tokenizers.Metaspace(),
        decoder=decoders.Metaspace(),
        normalizer=normalizers.NFKC(),
    )
    return _wrapped(own, "<s> $A </s>")


def _plain() -> PreTrainedTokenizerFast:
    """The builders' own: it adds nothing by itself."""
    own = _bytes().backend_tokenizer
    return byte_level(own.model, SPECIALS, bos="<s>", eos="</s>", chat=MARKED)


def _slow() -> Any:
    """No offsets; an end of sequence after everything."""
    own = ByT5Tokenizer()
    own.chat_template = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    own.bos_token = "<pad>"
    return own


TOKENISERS: dict[str, Callable[[], Any]] = {
    "bytes": _plain,
    "bytes, trimmed offsets": _bytes,
    "bytes, a beginning": lambda: _bytes("<s> $A"),
    "bytes, a beginning and an end": lambda: _bytes("<s> $A </s>", trim=False),
    "bytes across words": lambda: _bytes("<s> $A", regex=False),
    "pieces, normalised, a beginning and an end": _unigram,
    "slow bytes": _slow,
}
MADE: dict[str, Any] = {}


def tokeniser(name: str) -> Any:
    """A tokeniser of the table, made once."""
    if name not in MADE:
        MADE[name] = TOKENISERS[name]()
    return MADE[name]


def reader(tokenizer: Any, *, context: int | None = None, rows: int = 10**6) -> Any:
    """A target that only reads: what an encoder asks of one."""
    eos = tokenizer.eos_token_id
    return SimpleNamespace(
        tokenizer=tokenizer,
        name="small",
        context=context,
        bos_id=tokenizer.bos_token_id,
        eos_id=eos,
        pad_id=eos,
        head=torch.zeros(1, 1),
        model=SimpleNamespace(get_input_embeddings=lambda: SimpleNamespace(weight=torch.zeros(1).expand(rows, 1))),
    )
