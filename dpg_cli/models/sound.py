"""Whether a loaded model is what its folder promises: a causal LM with a head, and a vocabulary that its tokeniser fits."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from dpg_cli.models.folder import ModelError
from dpg_cli.models.hub import first_line

TOKENS = 8  # of the trial rows, of which there are as many
LEAK = 1e-4  # of the later change: what earlier logits may move by rounding


def known_ids(tokenizer: Any) -> set[int]:
    """Every id that a tokeniser has a token for, added ones included."""
    return set(tokenizer.get_vocab().values())


def require_vocabulary(name: str, model: PreTrainedModel, ids: set[int]) -> None:
    """Refuse a tokeniser that has tokens without a row of the embedding, or of the head.

    Args:
        name: how the user named the model.
        model: it.
        ids: that the tokeniser knows.

    Raises:
        ModelError: naming the first such id.
    """
    head = model.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is None:
        raise ModelError(f"The model {name!r} has no LM head.", "Name a folder that a *ForCausalLM class saved.")
    rows = min(head.weight.shape[0], model.get_input_embeddings().weight.shape[0])
    beyond = sorted(number for number in ids if number >= rows)
    if beyond:
        raise ModelError(
            f"The tokeniser of {name!r} has {len(beyond):,} tokens beyond the {rows:,} rows of the model's embedding, "
            f"the first with id {beyond[0]:,}.",
            "Take the tokeniser that the model was saved with; or resize_token_embeddings(len(tokenizer)) and save both.",
        )


@torch.no_grad()
def require_causal(name: str, model: PreTrainedModel, limit: int | None) -> None:
    """Refuse a model that is no causal LM by what it does: earlier logits must not see later tokens, and be finite.

    Args:
        name: how the user named the model.
        model: it, in eval mode.
        limit: longest row that it reads, or None.

    Raises:
        ModelError: with what was seen.
    """
    head = model.get_output_embeddings().weight
    length = min(TOKENS, limit or TOKENS)
    rows = min(head.shape[0], model.get_input_embeddings().weight.shape[0])
    first = torch.arange(length, device=head.device) * 7 % rows
    one = torch.eye(length, dtype=torch.int64, device=head.device)
    others = (first + one)[1:] % rows  # row j has another token j + 1
    try:
        logits = model(input_ids=torch.cat([first[None], others]), use_cache=False).logits.double()
    except Exception as error:  # of a class that needs more than token ids
        raise ModelError(
            f"The model {name!r} does not run on a row of tokens: {first_line(error)}.",
            "Name a causal LM of text.",
        ) from error
    if not bool(torch.isfinite(logits).all()):
        raise ModelError(
            f"The logits of {name!r} are not finite: its weights hold NaN or infinite numbers.",
            "Take the folder from a copy; a float16 training that overflowed leaves such.",
        )
    change = (logits[1:] - logits[:1]).abs().amax(2)
    early = change.tril()  # at the places before the changed token
    if length > 1 and float(early.max()) > LEAK * float((change - early).max()):
        raise ModelError(
            f"The model {name!r} is no causal LM: what it predicts at a token depends on the tokens after it.",
            "Name a decoder; a BERT-like model needs is_decoder = true in its config.json, and training as such.",
        )
