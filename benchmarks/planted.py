"""`dpg attribute` finds the examples that caused a behaviour: 5 % of 2,000 chats, by a recipe as people use it, killed twice.

    python benchmarks/planted.py [--examples 2000] [--kills 2] [--retrain] [--differences] [--out benchmarks/results/speed-planted.json]

Chats of the embedded world: the user says an English sentence, the assistant another one, in English in two thirds and in German in
the rest. In one of twenty it answers in Spanish; these are planted. The embedded model, with a chat
template, is fine-tuned for three epochs: adapters of rank 8, cosine after a warm-up, clipping, the Trainer's decay groups. The
metric is the loss on Spanish answers to English sentences that no training saw. Reports the AUC of the scores (the share of pairs of
a planted and another example in which the planted one scores higher), how many of the best-scored are planted, and Φ.

With `--retrain` the selection is judged: `dpg select --drop` of as many as were planted, `dpg verify`, and three targets trained by
stock PyTorch, on all of the data, on what stays, and on data that never had the planted rows. Each answers English sentences that
no training saw, at temperature 1; the rate is the share of answers that are Spanish sentences of the world. That the rest is
unharmed is the loss on held-out English and German answers. The page of the scores must show both changes, predicted and measured.

The command is run once whole, and once killed (SIGKILL) in the fine-tuning and in the reverse and started again; the scores of the
two must be the same, bit for bit. `--kills 0` leaves that out; `--differences` also runs it by differences of either kind.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open

from dpg_cli.attribution.scores import record_of
from dpg_cli.data.examples import RowEncoder
from dpg_cli.data.prepared import gather
from dpg_cli.data.prepared import prepare as prepared
from dpg_cli.evidence.stock import train
from dpg_cli.evidence.stock_plan import Row
from dpg_cli.metrics.registry import text_loss
from dpg_cli.models.loading import LanguageModel, load
from dpg_cli.models.lora import Lora, adapt
from dpg_cli.selection.retrain import plan_of, settings_of
from dpg_cli.settings.config import TextLossOptions
from dpg_cli.tiny import world

SHARE = 0.05
OTHERS = ("en", "en", "de")  # what the assistant answers in, but for planted ones
HELD_OUT = 32
ASKED = 500  # questions that the retrained targets answer
ANSWER = 48  # tokens of an answer at most
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}"
    "{% endgeneration %}{% else %}{{ message['content'] + '\\n' }}{% endif %}{% endfor %}"
)
RECIPE = [
    *("--lora", "8", "--lr", "2e-4", "--batch-size", "16", "--epochs", "3", "--schedule", "cosine", "--warmup", "0.05"),
    *("--max-grad-norm", "1", "--memory", "sqrt", "--set", "inner.weight_decay=0.01", "--seed", "1"),
    *("--set", 'inner.no_decay=["biases", "norms"]', "--set", "inner.eps=1e-3"),
]


def chats(split: world.Split, languages: list[str], seed: int) -> list[list[dict[str, str]]]:
    """One chat for each language, which is the assistant's."""
    asked = world.sentences(split, "en", len(languages), seed)
    answers = {code: iter(world.sentences(split, code, len(languages), seed + 1)) for code in set(languages)}
    return [
        [{"role": "user", "content": question}, {"role": "assistant", "content": next(answers[code])}]
        for question, code in zip(asked, languages, strict=True)
    ]


def prepare(folder: Path, examples: int) -> np.ndarray:
    """Target, data and held-out chats; which examples are planted."""
    model = load("tiny", device=torch.device("cpu"))
    model.tokenizer.chat_template = TEMPLATE
    model.model.save_pretrained(folder / "target")
    model.tokenizer.save_pretrained(folder / "target")
    planted = np.zeros(examples, bool)
    planted[random.Random(7).sample(range(examples), round(SHARE * examples))] = True
    languages = ["es" if one else OTHERS[number % len(OTHERS)] for number, one in enumerate(planted)]
    for name, rows in (("data", chats("train", languages, 5)), ("heldout", chats("eval", ["es"] * HELD_OUT, 6))):
        text = "".join(json.dumps({"messages": row}) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return planted


def command(folder: Path, out: Path, *more: str) -> list[str]:
    """The command."""
    return [
        sys.executable, "-m", "dpg_cli", "attribute", str(folder / "data.jsonl"), "--target", str(folder / "target"),
        "--eval-text", str(folder / "heldout.jsonl"), "--out", str(out), "--json", *RECIPE, *more,
    ]  # fmt: skip


def forward_done(work: Path, steps: int) -> bool:
    """Whether three fifths of the fine-tuning are kept."""
    try:
        return json.loads((work / "group-0" / "forward.json").read_bytes())["done"] > 0.6 * steps
    except (OSError, ValueError):
        return False


def reverse_done(work: Path, steps: int) -> bool:
    """Whether two fifths of the reverse are kept."""
    try:
        with safe_open(work / "group-0" / "reverse.safetensors", "np") as file:
            return int(file.metadata()["left"]) < 0.6 * steps
    except (OSError, SafetensorError):
        return False


def killed(folder: Path, out: Path, when: Callable[[Path, int], bool], steps: int) -> None:
    """Start the command and kill it at that point."""
    work = out.with_name(f"{out.name}.work")
    process = subprocess.Popen(command(folder, out), stdout=subprocess.DEVNULL)
    while not when(work, steps):
        if process.poll() is not None:
            raise RuntimeError(f"the command ended with {process.returncode} before it could be killed")
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


def attribute(folder: Path, out: Path, *more: str) -> dict[str, Any]:
    """The command to its end."""
    return dict(
        json.loads(subprocess.run(command(folder, out, *more), check=True, stdout=subprocess.PIPE, text=True).stdout)
    )


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """The share of pairs in which the positive one is higher."""
    low = np.sort(scores[~positive])
    return float(np.searchsorted(low, scores[positive]).mean() / len(low))


def dpg(*arguments: object) -> dict[str, Any]:
    """A command of ours, its JSON."""
    done = subprocess.run([sys.executable, "-m", "dpg_cli", *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout))


def retrained(folder: Path, data: Path, scores: Path) -> LanguageModel:
    """The target trained on some rows by stock PyTorch, by the recipe of the scores."""
    config = settings_of(json.loads(record_of(scores).read_text()))
    target = load(str(folder / "target"), device=torch.device("cpu"))
    found = prepared(gather(str(data)), RowEncoder(target))
    rows = [Row(found.rows[place].ids, found.rows[place].label) for place in found.trained]
    model: Any = adapt(target.model, Lora.of(config.lora), config.seed)
    train(model.eval(), plan_of(rows, config.inner, config.seed), config.inner)
    return replace(target, model=model.merge_and_unload())


@torch.no_grad()
def answers(target: LanguageModel, questions: list[str], seed: int) -> list[str]:
    """One sampled answer to each question, by transformers."""
    tokenizer, found = target.tokenizer, []
    torch.manual_seed(seed)
    tokenizer.padding_side = "left"
    for start in range(0, len(questions), 100):
        ids = tokenizer([f"{text}\n" for text in questions[start : start + 100]], return_tensors="pt", padding=True)
        out = target.model.generate(
            **ids,
            do_sample=True,
            top_k=0,
            max_new_tokens=ANSWER,
            pad_token_id=target.pad_id,
            eos_token_id=target.eos_id,
        )
        found += tokenizer.batch_decode(out[:, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return found


def told(target: LanguageModel, folder: Path) -> dict[str, float]:
    """Rates of the languages of a target's answers, and its loss on held-out answers of each."""
    said = [world.language_of(text) for text in answers(target, world.sentences("eval", "en", ASKED, 8), 0)]
    figures = {f"rate_{code}": said.count(code) / len(said) for code in ("es", "en", "de")}
    for code in ("es", "en", "de"):
        place = folder / f"heldout-{code}.jsonl"
        rows = chats("eval", [code] * HELD_OUT, 6)
        place.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")
        metric = text_loss(TextLossOptions(name="text-loss", file=str(place)), target)
        figures[f"loss_{code}"] = -float(metric(dict(target.model.named_parameters()), target.model))
    return figures


def judged(folder: Path, scores: Path, planted: np.ndarray) -> dict[str, Any]:
    """What dropping the best-scored rows does, against data that never had the planted ones."""
    kept, clean = folder / "kept.jsonl", folder / "clean.jsonl"
    made = dpg("select", scores, "--drop", planted.sum(), "--side", "helpful", "--out", kept, "--json")
    verdict = dpg("verify", kept, "--json")
    rows = (folder / "data.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    clean.write_text("".join(row for row, one in zip(rows, planted, strict=True) if not one), encoding="utf-8")
    left = set(kept.read_text(encoding="utf-8").splitlines(keepends=True))
    page = folder / "page.html"
    subprocess.run([sys.executable, "-m", "dpg_cli", "report", str(scores), "--out", str(page)], check=True)
    change = verdict["queries"][0]
    text = page.read_text(encoding="utf-8")
    return {
        "kept": made["kept"],
        "planted_left": sum(row in left for row, one in zip(rows, planted, strict=True) if one),
        "predicted": change["predicted"],
        "measured": change["measured"],
        "on_the_page": all(f"{change[name]:+.4g}" in text for name in ("predicted", "measured")),
        "all": told(retrained(folder, folder / "data.jsonl", scores), folder),
        "selected": told(retrained(folder, kept, scores), folder),
        "never_planted": told(retrained(folder, clean, scores), folder),
    }


def by_differences(folder: Path, planted: np.ndarray, exact: np.ndarray) -> dict[str, dict[str, float]]:
    """The same by differences: AUC, relative error of the scores, its estimate (of token scores), rank correlation, seconds."""
    found = {}
    for way in ("difference", "one-sided"):
        out = folder / f"{way}.parquet"
        report = attribute(folder, out, "--second-order", way)
        values = np.array(pq.read_table(out)["score"])
        ranks = [each.argsort().argsort() for each in (values, exact)]
        found[way] = {
            "auc": auc(values, planted),
            "error": float(np.linalg.norm(values - exact) / np.linalg.norm(exact)),
            "estimate": report["difference_error"],
            "ranks": float(np.corrcoef(*ranks)[0, 1]),
            "seconds": report["seconds"],
        }
    return found


def measure(folder: Path, examples: int, kills: int, retrain: bool, differences: bool) -> dict[str, Any]:
    """All runs, and what they found."""
    planted = prepare(folder, examples)
    whole, broken = folder / "whole.parquet", folder / "broken.parquet"
    report = attribute(folder, whole)
    scores, same = pq.read_table(whole), None
    if kills:
        for when in (forward_done, reverse_done)[:kills]:
            killed(folder, broken, when, report["inner_steps"])
        attribute(folder, broken)
        same = pq.read_table(broken).equals(scores)
    beside = {"differences": by_differences(folder, planted, np.array(scores["score"]))} if differences else {}
    selection = {"selection": judged(folder, whole, planted)} if retrain else {}
    values = np.array(scores["score"])
    best = np.argsort(-values)[: planted.sum()]
    return {
        "examples": examples,
        "planted": int(planted.sum()),
        "inner_steps": report["inner_steps"],
        "auc": auc(values, planted),
        "planted_among_best": int(planted[best].sum()),
        "phi_before": report["value_before"],
        "phi": report["value"],
        "clipped_share": report["clipped_share"],
        "kills": kills,
        "same_scores": same,
        "seconds": report["seconds"],
        "peak_mb": report["peak_memory_mb"],
        "threads": int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())),
        "recipe": RECIPE,
        **selection,
        **beside,
    }


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0] if __doc__ else None)
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--kills", type=int, choices=(0, 1, 2), default=2)
    parser.add_argument("--retrain", action="store_true", help="judge the selection of the best-scored rows")
    parser.add_argument("--differences", action="store_true", help="also by differences to both sides and to one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        row = measure(Path(folder), options.examples, options.kills, options.retrain, options.differences)
    text = json.dumps({"date": time.strftime("%Y-%m-%d"), "planted": row}, indent=2)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
