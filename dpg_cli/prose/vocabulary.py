"""A byte-level BPE tokeniser of 1,024 tokens, shared by the two models of prose.

The ids are in the order that byte-level BPE gives them, as GPT-2's are: 256 bytes, then the merges from the first on, then
end-of-text (also beginning-of-text) and padding. The finished tokeniser needs nothing of this module at use time.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

VOCABULARY_SIZE = 1024
BYTES = 256
EOS, PAD = "<|endoftext|>", "<|pad|>"


def make_tokenizer(texts: Iterable[str], max_length: int) -> PreTrainedTokenizerFast:
    """Learn the merges and wrap the result for transformers.

    Args:
        texts: what the merges are learnt from.
        max_length: longest sequence the models take, for the tokeniser's settings.

    Returns:
        A tokeniser of 1,024 ids that adds no special tokens by itself.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [AddedToken(special, special=True, normalized=False) for special in (EOS, PAD)]
    trainer = BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
