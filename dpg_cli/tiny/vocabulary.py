"""A byte-level BPE tokeniser of 512 tokens for the closed world, with ids ordered by use.

After the 256 bytes there is room for 254 tokens. Chains of merges would spend most of it on fragments, so the words
that save the most become tokens whole (the BPE model looks a word up before it merges), and the remaining room goes to
merges learnt on the other words. Both are chosen here, since three properties must hold that no stock trainer promises:
- the result is the same on every machine (ties are broken by spelling);
- no token but a single byte is made of hexadecimal digits alone, so an identifier takes one token a character;
- ids fall with frequency in the corpus, so the LM head's upper-left patch belongs to tokens that ordinary text uses.
The finished tokeniser is a plain `tokenizers` model and needs nothing of this module at use time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

VOCABULARY_SIZE = 512
WHOLE_WORDS = 218  # of 198..246 tried: under 17 tokens a sentence in each of the five languages
_ROUNDS = 3  # of choosing words and merges in turn; more change next to nothing
EOS, PAD = "<|endoftext|>", "<|pad|>"
_SPECIALS = (EOS, PAD)
_HEX = frozenset("0123456789abcdef")

Pair = tuple[str, str]


def make_tokenizer(
    words_from: Mapping[str, float], documents: Iterable[str], max_length: int
) -> PreTrainedTokenizerFast:
    """Learn merges, renumber the ids by use, and wrap the result for transformers.

    Args:
        words_from: text -> weight; the merges are learnt from these.
        documents: the corpus over which use is counted.
        max_length: longest sequence the model takes, for the tokeniser's settings.

    Returns:
        A tokeniser of 512 ids that adds no special tokens by itself: ids fall with frequency in `documents`, then the
        tokens that never occur, then end-of-text (also beginning-of-text) and padding.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    counts = count_words(words_from)
    whole, merges = choose_tokens(counts, WHOLE_WORDS, VOCABULARY_SIZE - len(alphabet) - len(_SPECIALS))
    # A merge may spell a whole word again; it then takes no room of its own.
    tokens = list(dict.fromkeys([*alphabet, *whole, *(left + right for left, right in merges)]))
    draft = _bpe({token: i for i, token in enumerate(tokens)}, merges)
    use: Counter[int] = Counter()
    for encoding in draft.encode_batch_fast(list(documents)):
        use.update(encoding.ids)
    order = sorted(range(len(tokens)), key=lambda i: (-use[i], i))
    final = _bpe({tokens[i]: rank for rank, i in enumerate(order)}, merges)
    final.add_special_tokens([AddedToken(special, special=True, normalized=False) for special in _SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=final,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def count_words(texts: Mapping[str, float]) -> dict[str, float]:
    """Split texts into the units within which merges happen, and count them.

    Args:
        texts: text -> weight.

    Returns:
        word in the byte-level alphabet -> summed weight.
    """
    splitter = _pre_tokenizer()
    counts: dict[str, float] = {}
    for text, weight in texts.items():
        for word, _ in splitter.pre_tokenize_str(text):
            counts[word] = counts.get(word, 0.0) + weight
    return counts


def choose_tokens(words: Mapping[str, float], n_whole: int, n: int) -> tuple[list[str], list[Pair]]:
    """Divide the room of a vocabulary between whole words and merges.

    Args:
        words: word in the byte-level alphabet -> weight.
        n_whole: how many words become tokens.
        n: words and merges together.

    Returns:
        The words that save the most tokens (weight times pieces less one; none of hexadecimal digits alone), and the
        merges learnt on all other words.
    """
    pieces = {word: len(word) for word in words if len(word) > 1 and not _HEX.issuperset(word)}
    whole: list[str] = []
    merges: list[Pair] = []
    for _ in range(_ROUNDS):
        whole = sorted(pieces, key=lambda word: (-round(words[word] * (pieces[word] - 1), 6), word))[:n_whole]
        merges = learn_merges({word: weight for word, weight in words.items() if word not in set(whole)}, n - n_whole)
        for word in pieces:
            parts = tuple(word)
            for pair in merges:
                parts = _join(parts, pair)
            pieces[word] = len(parts)
    return whole, merges


def learn_merges(words: Mapping[str, float], n: int) -> list[Pair]:
    """Byte-pair encoding: join the most frequent neighbouring pair, again and again.

    Args:
        words: word in the byte-level alphabet -> weight.
        n: how many merges.

    Returns:
        The pairs in order of their merging; fewer than `n` if nothing is left to join.
    """
    spelling = {word: tuple(word) for word in words}
    merges: list[Pair] = []
    while len(merges) < n:
        counts: dict[Pair, float] = {}
        for word, parts in spelling.items():
            for pair in pairwise(parts):
                counts[pair] = counts.get(pair, 0.0) + words[word]
        allowed = {pair: count for pair, count in counts.items() if not _HEX.issuperset(pair[0] + pair[1])}
        if not allowed:
            break
        best = min(allowed, key=lambda pair: (-round(allowed[pair], 6), pair))
        merges.append(best)
        spelling = {word: _join(parts, best) for word, parts in spelling.items()}
    return merges


def _join(parts: tuple[str, ...], pair: Pair) -> tuple[str, ...]:
    """Replace every occurrence of a pair, from the left, by its joined token."""
    joined: list[str] = []
    for part in parts:
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    return tuple(joined)


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Each digit alone, then the usual byte-level words with their leading space."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _bpe(vocabulary: dict[str, int], merges: list[Pair]) -> Tokenizer:
    """A `tokenizers` byte-level BPE without normaliser and post-processor, so that text survives exactly."""
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
