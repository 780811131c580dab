"""What transformers' Trainer counts into a step's mean for rows whose every token is a label, where that is not what we count.

For classes that it does not know to shift their labels (`GPT2LMHeadModel` is one), transformers 5.23 takes a row's first token
into the count, though nothing predicts it (`Trainer._loss_shifts_labels`, `Trainer.get_batch_samples`). docs/limitations.md.
"""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from dpg_cli.engine.records import Examples


def trainer_mean_note(model: PreTrainedModel, examples: Examples, normalization: str) -> str | None:
    """What to say of plain texts whose steps the Trainer would make smaller; None where it counts as we do.

    Args:
        model: the target, before it gets adapters.
        examples: of the run.
        normalization: of the recipe; only `token` is the Trainer's.
    """
    whole = examples.label_N_S.sum(1) == examples.attention_N_S.sum(1) - 1
    if normalization != "token" or not bool(whole.any()):
        return None
    if LOSS_MAPPING.get(getattr(model, "loss_type", None) or "") is ForCausalLMLoss:
        return None
    share = int(whole.sum()) / (int(examples.label_N_S.sum()) + int(whole.sum()))
    return (
        f"transformers' Trainer also counts the first token of each plain text into the mean for {type(model).__name__}: "
        f"its gradients are {share:.1%} smaller than those here (docs/limitations.md)"
    )
