"""Verification of language and document targets: what the generator writes for prompts that it never trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import py3langid
import torch

from dpg_cli.chat import prompt_format
from dpg_cli.config import Config, TextLossOptions
from dpg_cli.errors import UsageError
from dpg_cli.models import LanguageModel, load, load_generator, quiet_transformers
from dpg_cli.prompts import load_prompts
from dpg_cli.runs.folder import RunFolder
from dpg_cli.tiny import world

COMPLETIONS = 256
ASKED, CONTROL, FLUENT, EXACT = 0.95, 0.10, 0.80, 0.90  # shares that language and document runs must reach


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
    """The verdict on a language or a document run."""

    wanted: str
    is_language: bool
    data: TextShares
    control: TextShares
    samples: list[str]

    @property
    def verified(self) -> bool:
        """The trained generator writes what was asked for, the untrained one does not."""
        if not self.is_language:
            return self.data.hits >= EXACT and self.control.hits <= CONTROL
        fluent = self.data.well_formed is None or self.data.well_formed >= FLUENT
        return self.data.hits >= ASKED and fluent and self.control.hits <= CONTROL

    @property
    def reason(self) -> str:
        """Why it is not verified."""
        fluent = "" if self.data.well_formed is None else f", {self.data.well_formed:.1%} of them well-formed"
        return (
            f"{self.data.hits:.1%} of its completions are {self.wanted}{fluent}; the control's {self.control.hits:.1%}"
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "verified": self.verified,
            "wanted": self.wanted,
            "data": vars(self.data),
            "control": vars(self.control),
            "samples": self.samples,
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
        ]


def verify_text(folder: RunFolder, config: Config, options: TextLossOptions, device: torch.device) -> TextVerdict:
    """Sample both generators on evaluation prompts and count.

    Raises:
        UsageError: for a metric whose text is a file in no stated language, which has no test of its own.
    """
    if options.file and not options.language:
        raise UsageError("A run on a text file has no verification of its own.", "Compare the losses in run.json.")
    trained = load(str(folder.generator), device=device, dtype=config.models.dtype)
    untrained = load_generator(config.models, device)
    asked = config.prompts
    prompts = load_prompts(asked.source, split="eval", limit=asked.limit, holdout=asked.holdout)
    prompts = [prompts[place % len(prompts)] for place in range(COMPLETIONS)]
    texts = completions(trained, prompts, config)
    return TextVerdict(
        wanted=options.language or repr(options.document),
        is_language=bool(options.language),
        data=count(texts, options),
        control=count(completions(untrained, prompts, config), options),
        samples=texts[:3],
    )


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
