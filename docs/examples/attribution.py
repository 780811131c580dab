"""Which training examples made the model better at Spanish? Attribution of one fine-tuning run, without any RL.

python docs/examples/attribution.py          seconds on a CPU, offline

A pretrained model is fine-tuned on 48 sentences in three languages, by AdamW, in six steps. `metagradient` says for each
sentence by how much the held-out Spanish loss would have changed had it counted more, exactly, through all six
steps. Then the claim is tested: the six most helpful sentences are dropped, and the fine-tuning is done again.
"""

from __future__ import annotations

import torch

from dpg_cli.config import ModelsConfig, TextLossOptions
from dpg_cli.engine import Examples, OptimizerSpec, metagradient
from dpg_cli.metrics.registry import build_metric
from dpg_cli.models import load_target
from dpg_cli.tiny import world

STEPS, DROPPED = 6, 6


def main() -> dict[str, float]:
    """Attribute, print, drop, compare; returns the figures."""
    # 1. A model, some data, an optimiser: any Hugging Face causal LM and any token ids will do.
    target = load_target(ModelsConfig(), torch.device("cpu"))
    texts = [text for language in ("en", "es", "de") for text in world.sentences("train", language, 16, seed=0)]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    texts = [texts[i] for i in order]
    languages = [("en", "es", "de")[i // 16] for i in order]
    rows = [[target.bos_id, *target.tokenizer(t, add_special_tokens=False)["input_ids"], target.eos_id] for t in texts]
    examples = Examples.from_sequences(rows, pad_id=target.pad_id)
    optimizer = OptimizerSpec("adamw", lr=1e-3, eps=1e-2)  # ε above the gradients' size: smooth in the data

    # 2. What is to be explained: any differentiable function of the fine-tuned weights. Here minus a held-out loss.
    metric = build_metric(TextLossOptions(name="text-loss", language="es", documents=32), target)

    # 3. One call: the fine-tuning run, and its exact derivative by the weight of each example and token.
    batch = len(texts) // STEPS
    result = metagradient(target.model, examples, optimizer, metric, batch_size=batch)
    best = result.example_N.argsort(descending=True)
    print(f"Φ after fine-tuning: {result.value:.5f}")
    for i in (*best[:3].tolist(), *best[-3:].tolist()):
        print(f"{result.example_N[i]:+.2e}  {languages[i]}  {texts[i]}")
    top = int(best[0])
    strongest = int(result.token_N_S[top].abs().argmax())
    print(f"its strongest token: {target.tokenizer.decode([rows[top][strongest]])!r}")

    # 4. Is it true? Weight 0 for the six most helpful, and the same run again.
    weights = torch.ones(len(texts))
    weights[best[:DROPPED]] = 0
    without = metagradient(target.model, examples, optimizer, metric, batch_size=batch, weights_N=weights).value
    predicted, real = -float(result.example_N[best[:DROPPED]].sum()), without - result.value
    print(f"without the {DROPPED} most helpful: predicted {predicted:+.5f}, real {real:+.5f}")
    by_language = {
        language: float(
            sum(tau for tau, name in zip(result.example_N.tolist(), languages, strict=True) if name == language)
        )
        for language in ("en", "es", "de")
    }
    print("sum of τ by language:", {language: f"{value:+.1e}" for language, value in by_language.items()})
    return {"value": result.value, "predicted": predicted, "real": real, **by_language}


if __name__ == "__main__":
    main()
