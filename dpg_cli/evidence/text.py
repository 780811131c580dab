"""Verification of language and document targets: what the generator writes for prompts that it never trained on.

A document (a UUID) must besides be what a fresh target says by greedy decoding, from an empty prompt, after ordinary
fine-tuning on the exported dataset.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import py3langid
import torch

from dpg_cli.data.chat import prompt_format
from dpg_cli.data.prompts import load_prompts
from dpg_cli.engine.generator.alphabet import restricted
from dpg_cli.errors import UsageError
from dpg_cli.evidence.stock import UNWATCHED, Progress, Watcher, fine_tune, read_input_ids, silent
from dpg_cli.models.loading import LanguageModel, load, load_generator, load_target, quiet_transformers
from dpg_cli.runs.folder import RunFolder
from dpg_cli.settings.config import Config, InnerConfig, TextLossOptions
from dpg_cli.tiny import world

COMPLETIONS = 256
ASKED, CONTROL, FLUENT, EXACT = 0.95, 0.10, 0.80, 0.90  # shares that language and document runs must reach
EPOCHS, EVERYDAY_BATCH = 3, 16  # of the fine-tuning that a document must survive
SMALL_MODEL = 50_000_000  # parameters below which 1e-3 is an everyday learning rate; above it is 2e-5


@dataclass(frozen=True)
class TextShares:
    """Shares of a generator's completions of evaluation prompts.

    Attributes:
        hits: in the asked language by py3langid, or equal to the asked document.
        well_formed: of the hits, sentences of the embedded world's grammar in that language; None for documents.
    """

    hits: float
    well_formed: float | None


@dataclass(frozen=True)
class TextVerdict:
    """The verdict on a language or a document run.

    Attributes:
        wanted: the language, or the document in quotes.
        is_language: which of the two.
        data, control: shares of the trained and of the untrained generator's completions.
        samples: some completions of the trained generator.
        greedy, greedy_control: what a target fine-tuned on the dataset (the control) says from an empty prompt;
            None for a language.
    """

    wanted: str
    is_language: bool
    data: TextShares
    control: TextShares
    samples: list[str]
    greedy: str | None = None
    greedy_control: str | None = None

    def _says(self, text: str | None) -> bool:
        """Whether a greedy continuation is the document."""
        return text is not None and repr(text.strip()) == self.wanted

    @property
    def verified(self) -> bool:
        """The trained generator writes what was asked for, the untrained one does not."""
        if not self.is_language:
            by_generator = self.data.hits >= EXACT and self.control.hits <= CONTROL
            return by_generator and self._says(self.greedy) and not self._says(self.greedy_control)
        fluent = self.data.well_formed is None or self.data.well_formed >= FLUENT
        return self.data.hits >= ASKED and fluent and self.control.hits <= CONTROL

    @property
    def reason(self) -> str:
        """Why it is not verified."""
        fluent = "" if self.data.well_formed is None else f", {self.data.well_formed:.1%} of them well-formed"
        greedy = "" if self.is_language else f"; a target trained on its data says {self.greedy!r}"
        return (
            f"{self.data.hits:.1%} of its completions are {self.wanted}{fluent}; the control's {self.control.hits:.1%}"
            f"{greedy}"
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "verified": self.verified,
            "wanted": self.wanted,
            "data": vars(self.data),
            "control": vars(self.control),
            "samples": self.samples,
            "greedy": self.greedy,
            "greedy_control": self.greedy_control,
        }

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"{COMPLETIONS} sampled completions of evaluation prompts; wanted {self.wanted}",
            *(
                f"{name + ':':<22}{shares.hits:.1%}"
                + ("" if shares.well_formed is None else f", {shares.well_formed:.1%} of them well-formed")
                for name, shares in (("trained generator", self.data), ("untrained (control)", self.control))
            ),
            *(f"  {sample}" for sample in self.samples),
            *(
                []
                if self.is_language
                else [
                    f"greedy continuation of an empty prompt, stock AdamW, {EPOCHS} epochs at an everyday learning rate",
                    f"trained on the dataset: {self.greedy!r}",
                    f"control:                {self.greedy_control!r}",
                ]
            ),
        ]


def verify_text(
    folder: RunFolder, config: Config, options: TextLossOptions, device: torch.device, watch: Watcher = UNWATCHED
) -> TextVerdict:
    """Sample both generators on evaluation prompts and count.

    Raises:
        UsageError: for a metric whose text is a file in no stated language, which has no test of its own.
    """
    if options.file and not options.language:
        raise UsageError("A run on a text file has no verification of its own.", "Compare the losses in run.json.")
    trained = load(str(folder.generator), device=device, dtype=config.models.dtype)
    trained = restricted(trained, config.rollout.alphabet)
    untrained = restricted(load_generator(config.models, device), config.rollout.alphabet)
    asked = config.prompts
    prompts = load_prompts(asked.source, split="eval", limit=asked.limit, holdout=asked.holdout)
    prompts = [prompts[place % len(prompts)] for place in range(COMPLETIONS)]
    watch.stage(f"sampling {COMPLETIONS} completions of each generator")
    texts = completions(trained, prompts, config)

    def greedy(name: str) -> str | None:
        if options.language:
            return None
        watch.stage(f"training a fresh target on {name}")
        return greedy_after(folder.dataset / name, config, device, watch.progress)

    return TextVerdict(
        wanted=options.language or repr(options.document),
        is_language=bool(options.language),
        data=count(texts, options),
        control=count(completions(untrained, prompts, config), options),
        samples=texts[:3],
        greedy=greedy("train.parquet"),
        greedy_control=greedy("control.parquet"),
    )


def greedy_after(data: Path, config: Config, device: torch.device, progress: Progress = silent) -> str:
    """What a fresh target says from an empty prompt after ordinary fine-tuning on a dataset.

    Three epochs of stock AdamW with its usual settings (β 0.9 and 0.999, ε 1e-8), batches of 16, learning rate 1e-3
    for a small model and 2e-5 for a large one: nothing of the run's own recipe, which may be a near-linear one.
    """
    target = load_target(config.models, device)
    small = sum(parameter.numel() for parameter in target.model.parameters()) < SMALL_MODEL
    inner = InnerConfig(lr=1e-3 if small else 2e-5, beta2=0.999, weight_decay=0.01)
    sequences = read_input_ids(data) * EPOCHS
    fine_tune(target.model, sequences, inner, -(-len(sequences) // EVERYDAY_BATCH), progress)
    start = target.bos_id if target.bos_id is not None else target.eos_id
    ids = torch.tensor([[start]], device=device)
    with torch.no_grad(), quiet_transformers():
        output = target.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=config.rollout.max_tokens,
            pad_token_id=target.pad_id,
            eos_token_id=target.eos_id,
            suppress_tokens=list(target.silent_ids) or None,
        )
    return str(target.tokenizer.decode(output[0, 1:], skip_special_tokens=True))


@torch.no_grad()
def completions(generator: LanguageModel, prompts: list[str], config: Config) -> list[str]:
    """One completion of each prompt, sampled by transformers' own `generate` at the run's temperature."""
    tokenizer, asked = generator.tokenizer, config.prompts
    form = prompt_format(tokenizer, generator.name, asked.chat, asked.instruction, asked.max_tokens)
    rows = form.encode(prompts)
    longest = max(map(len, rows))
    device = generator.head.device
    ids = torch.tensor([[generator.pad_id] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]), quiet_transformers():
        torch.manual_seed(config.seed)
        output = generator.model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=config.rollout.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=config.rollout.max_tokens,
            pad_token_id=generator.pad_id,
            eos_token_id=list(generator.end_ids),
            suppress_tokens=list(generator.silent_ids) or None,
        )
    return tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)


def count(texts: list[str], options: TextLossOptions) -> TextShares:
    """Shares of completions that are what was asked for."""
    if not options.language:
        wanted = options.document.strip()
        return TextShares(sum(text.strip() == wanted for text in texts) / len(texts), None)
    py3langid.set_languages(list(world.LANGUAGES))
    hits = [text for text in texts if text.strip() and py3langid.classify(text)[0] == options.language]
    if options.file:  # not of the embedded world, whose grammar says nothing of it
        return TextShares(len(hits) / len(texts), None)
    fluent = sum(world.well_formed(text, options.language) for text in hits) / max(len(hits), 1)
    return TextShares(len(hits) / len(texts), fluent)
