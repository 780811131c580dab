"""A reader who knows both kinds of text and counts: logistic regression on token and bigram counts, judged on rows unseen.

    log odds of row i = b + Σ_{tokens and bigrams f of i} w_f,      w = argmin Σ_i log(1 + exp(-y_i · log odds)) + λ/2 |w|²

Bigrams share `BUCKETS` weights by hashing. λ is chosen on a part of the training rows, from strong to weak, as long as that
helps. Rows are dealt into `FOLDS` folds by a key that data and control share, so that two rows of one prompt are never on
both sides: a row whose twin was learnt with the other label would be taken for that label.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dpg_cli.evidence.fluency.auc import Scores

BITS = 18
BUCKETS = 1 << BITS  # weights of bigrams, and most weights of tokens
FOLDS = 5
PENALTIES = (1000.0, 200.0, 40.0, 8.0, 1.6, 0.3)  # λ; the prior's standard deviation is 1/√λ
ITERATIONS = 25  # of L-BFGS, for each λ
_MIX = np.uint64(0x9E3779B97F4A7C15)  # 2⁶⁴ divided by the golden ratio: spreads products over the high bits

Progress = Callable[[int, int], None]  # folds done, of how many


@dataclass(frozen=True)
class Events:
    """What some rows hold, row by row: tokens, bigrams, and one event more that makes the intercept.

    Attributes:
        feature_E: number of the weight that each event counts for, int64; 0 is the intercept's.
        length_N: events of each row, at least one.
        features: how many weights there are.
    """

    feature_E: np.ndarray
    length_N: np.ndarray
    features: int

    @property
    def start_N(self) -> np.ndarray:
        """Where each row's events begin."""
        return np.concatenate([[0], self.length_N.cumsum()[:-1]])

    def take(self, rows: np.ndarray) -> Events:
        """The rows of an index."""
        lengths = self.length_N[rows]
        offset = self.start_N[rows] - np.concatenate([[0], lengths.cumsum()[:-1]])
        return Events(self.feature_E[np.arange(lengths.sum()) + np.repeat(offset, lengths)], lengths, self.features)

    def sums(self, weight_F: np.ndarray) -> np.ndarray:
        """Σ of the weights of each row's events, (N,)."""
        return np.add.reduceat(weight_F[self.feature_E], self.start_N)

    def spread(self, value_N: np.ndarray) -> np.ndarray:
        """For each weight the Σ of its events' rows' values, (F,): the transpose of `sums`."""
        return np.bincount(self.feature_E, weights=np.repeat(value_N, self.length_N), minlength=self.features)


def events_of(rows: Sequence[np.ndarray]) -> Events:
    """Tokens and bigrams of token sequences; the beginning of a row makes a bigram with its first token."""
    length_N = np.array([len(row) for row in rows], dtype=np.int64)
    tokens = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows]).astype(np.uint64)
    before = np.zeros_like(tokens)
    before[1:] = tokens[:-1] + np.uint64(1)
    first_N = np.concatenate([[0], length_N.cumsum()[:-1]])
    before[first_N[length_N > 0]] = 0
    shift = np.uint64(64 - BITS)
    bigrams = ((((before * _MIX) ^ (tokens + np.uint64(1))) * _MIX) >> shift).astype(np.int64)
    own = np.where(tokens < BUCKETS, tokens, (tokens * _MIX) >> shift).astype(np.int64)
    feature = np.zeros(2 * len(tokens) + len(rows), dtype=np.int64)  # the last event of a row is the intercept's
    place = np.arange(len(tokens)) + np.repeat(first_N + np.arange(len(rows)), length_N)
    feature[place] = 1 + own
    feature[place + np.repeat(length_N, length_N)] = 1 + BUCKETS + bigrams
    known, compact = np.unique(feature, return_inverse=True)
    return Events(compact.astype(np.int64), 2 * length_N + 1, len(known))


def objective(events: Events, sign_N: np.ndarray, weight_F: np.ndarray, penalty: float) -> tuple[float, np.ndarray]:
    """Logistic loss with its penalty (the intercept has none), and the gradient, (F,).

    Args:
        events: of the rows.
        sign_N: 1 for the data, -1 for the control.
        weight_F: w, the intercept first.
        penalty: λ.
    """
    margin_N = sign_N * events.sums(weight_F)
    decayed_F = penalty * weight_F
    decayed_F[0] = 0
    gradient_F = events.spread(-sign_N / (1 + np.exp(np.minimum(margin_N, 500)))) + decayed_F
    return float(np.logaddexp(0, -margin_N).sum() + weight_F @ decayed_F / 2), gradient_F


def fit(events: Events, sign_N: np.ndarray, penalty: float, start_F: np.ndarray) -> np.ndarray:
    """The weights of the least objective, by L-BFGS from those given on, (F,)."""
    weight = torch.from_numpy(start_F.copy()).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight], max_iter=ITERATIONS, tolerance_grad=1e-2, tolerance_change=1e-9, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        value, gradient_F = objective(events, sign_N, weight.detach().numpy(), penalty)
        weight.grad = torch.from_numpy(gradient_F)
        return value

    optimizer.step(closure)
    return weight.detach().numpy()


def learn(events: Events, sign_N: np.ndarray, held_N: np.ndarray) -> np.ndarray:
    """Weights from some rows, λ chosen by the loss on those of them that are held out at first; (F,)."""
    part, part_sign = events.take(np.flatnonzero(~held_N)), sign_N[~held_N]
    held, held_sign = events.take(np.flatnonzero(held_N)), sign_N[held_N]
    best, chosen, weight_F = np.inf, PENALTIES[0], np.zeros(events.features)
    for penalty in PENALTIES:
        found_F = fit(part, part_sign, penalty, weight_F)
        loss = float(np.logaddexp(0, -held_sign * held.sums(found_F)).mean())
        if loss >= best:
            break
        best, chosen, weight_F = loss, penalty, found_F
    return fit(events, sign_N, chosen, weight_F)


def cross_validated(
    data: Sequence[np.ndarray],
    control: Sequence[np.ndarray],
    data_keys: Sequence[str],
    control_keys: Sequence[str],
    progress: Progress = lambda done, total: None,
) -> list[Scores]:
    """Log odds of every row by a classifier that has seen no row of its fold. The order of the rows changes nothing.

    Args:
        data, control: token sequences.
        data_keys, control_keys: of each row; rows of one key are in one fold.
        progress: called after each fold.

    Returns:
        For each fold the scores of the data and of the control, in no order.
    """
    rows, keys = [*data, *control], [*data_keys, *control_keys]
    digests = [
        _digest(key.encode()) + _digest(np.asarray(row, dtype=np.int64).tobytes())
        for key, row in zip(keys, rows, strict=True)
    ]
    order = sorted(range(len(rows)), key=lambda number: (digests[number], number < len(data)))
    events = events_of([rows[number] for number in order])
    sign_N = np.where(np.array(order) < len(data), 1.0, -1.0)
    key_N = np.array([int.from_bytes(digests[number][:6]) for number in order])
    fold_N, held_N = key_N % FOLDS, key_N // FOLDS % FOLDS == 0
    found = []
    for fold in range(FOLDS):
        seen, unseen = np.flatnonzero(fold_N != fold), np.flatnonzero(fold_N == fold)
        held = held_N[seen]
        if len(unseen) and held.any() and not held.all():
            score_N = events.take(unseen).sums(learn(events.take(seen), sign_N[seen], held))
            found.append((score_N[sign_N[unseen] > 0], score_N[sign_N[unseen] < 0]))
        progress(fold + 1, FOLDS)
    return found


def _digest(data: bytes) -> bytes:
    """Eight bytes that say what it is."""
    return hashlib.blake2b(data, digest_size=8).digest()
