"""How prompts become token ids: chat templates, instructions, cutting; and which tokens end a completion."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import save_gpt2, save_instruct_llama

from dpg_cli.data.chat import prompt_format
from dpg_cli.driver.build import build
from dpg_cli.engine.generator.rollout import Sampling, sample
from dpg_cli.errors import ConfigError, UsageError
from dpg_cli.evidence.text import completions
from dpg_cli.models.loading import LanguageModel, load
from dpg_cli.settings.config import validate

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    save_instruct_llama(place / "llama")
    save_gpt2(place / "gpt2")
    return {"llama": place / "llama", "gpt2": place / "gpt2"}


@pytest.fixture
def llama(folders: dict[str, Path]) -> LanguageModel:
    return load(str(folders["llama"]), device=CPU)


WRAPPED = "<|begin|><|start|>user\nToday: 26 Jul 2024\nthe cat<|eot|><|start|>assistant\n"


def test_instruct_models_are_asked_through_their_template(llama: LanguageModel, folders: dict[str, Path]) -> None:
    form = prompt_format(llama.tokenizer, "x", "auto", "", 0)
    assert form.write(["the cat"]) == [WRAPPED]
    (row,) = form.encode(["the cat"])
    assert row.count(llama.bos_id) == 1
    assert llama.tokenizer.decode(row) == WRAPPED
    assert row == llama.tokenizer.apply_chat_template(
        [{"role": "user", "content": "the cat"}],
        add_generation_prompt=True,
        return_dict=False,
        date_string="26 Jul 2024",
    )
    never = prompt_format(llama.tokenizer, "x", "never", "", 0)
    assert llama.tokenizer.decode(never.encode(["the cat"])[0]) == "<|begin|>the cat"

    base = load(str(folders["gpt2"]), device=CPU)
    plain = prompt_format(base.tokenizer, "x", "auto", "", 0)
    assert base.tokenizer.decode(plain.encode(["the cat"])[0]) == "<|endoftext|>the cat"
    with pytest.raises(UsageError, match=r"no chat template.*prompts\.chat=auto"):
        prompt_format(base.tokenizer, "base", "always", "", 0)


def test_instructions_and_cutting(llama: LanguageModel) -> None:
    form = prompt_format(llama.tokenizer, "x", "never", "Say {text} {again}.", 0)
    assert form.write(["this"]) == ["Say this {again}."]
    text = "the old cat paints a red boat, ünïcödé and all, " * 40
    for limit in (1, 7, 50):
        cut = prompt_format(llama.tokenizer, "x", "never", "", limit).write([text, "the"])
        assert cut[1] == "the"
        assert text.startswith(cut[0])
        assert 0 < len(llama.tokenizer(cut[0])["input_ids"]) <= limit
    with pytest.raises(ConfigError, match=r"prompts\.instruction: has no \{text\}"):
        validate({"prompts": {"instruction": "rephrase"}})


def test_a_template_that_fails_is_refused(llama: LanguageModel) -> None:
    for template in ("{{ raise_exception('no user turns here') }}", "{% for %}"):
        llama.tokenizer.chat_template = template
        with pytest.raises(UsageError, match="chat template of 'x' fails"):
            prompt_format(llama.tokenizer, "x", "auto", "", 0)


def test_completions_end_at_every_end_token(llama: LanguageModel, folders: dict[str, Path]) -> None:
    begin, end, eot = llama.tokenizer.convert_tokens_to_ids(["<|begin|>", "<|end|>", "<|eot|>"])
    assert (llama.bos_id, llama.eos_id, llama.end_ids) == (begin, end, (end, eot))
    # the end of turn is found in the template, where the generation settings do not name it
    llama.model.generation_config.eos_token_id = end
    llama.model.save_pretrained(folders["llama"].parent / "quiet")
    llama.tokenizer.save_pretrained(folders["llama"].parent / "quiet")
    assert load(str(folders["llama"].parent / "quiet"), device=CPU).end_ids == (end, eot)
    assert load("tiny", device=CPU).end_ids == (510,)

    with torch.no_grad():  # an even distribution: one draw in 190 ends
        for parameter in llama.model.parameters():
            parameter.zero_()
    sampling = Sampling(8, 300, 3, 1.0, end, end, end_ids=llama.end_ids)
    rollout = sample(llama.model, llama.tokenizer, ["a", "b", "c"], sampling, torch.Generator().manual_seed(0))
    last = rollout.ids_N_K.gather(1, rollout.mask_N_K.sum(1, keepdim=True) - 1)[:, 0]
    stops = torch.tensor([end, eot])
    finished = torch.isin(last, stops)
    assert {end, eot} <= set(last.tolist())
    before = torch.where(rollout.mask_N_K, rollout.ids_N_K, begin)
    assert int(torch.isin(before, stops).sum()) == int(finished.sum())
    assert int(rollout.mask_N_K.sum(1).min()) >= 3
    # with two barred tokens, each of the others is as likely as any
    assert float(rollout.logprobs_N_K[0, 0].exp()) == pytest.approx(1 / (len(llama.tokenizer) - 2), rel=1e-4)


def test_evaluation_asks_as_training_does(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' generate is given the very ids that the rollout starts from, and the same end tokens."""
    config = validate({"prompts": {"instruction": "Again: {text}", "max_tokens": 3}, "rollout": {"max_tokens": 5}})
    seen: dict[str, torch.Tensor] = {}
    generate = llama.model.generate

    def spy(**options):
        seen.update(options)
        return generate(**options)

    monkeypatch.setattr(llama.model, "generate", spy)
    prompts = ["the old cat paints a boat", "now"]
    texts = completions(llama, prompts, config)
    assert len(texts) == 2
    form = prompt_format(llama.tokenizer, "x", "auto", "Again: {text}", 3)
    settings = Sampling(1, 5, 1, 1.0, llama.eos_id, llama.pad_id, end_ids=llama.end_ids, prompts=form)
    rollout = sample(llama.model, llama.tokenizer, prompts, settings, torch.Generator().manual_seed(0))
    assert torch.equal(seen["input_ids"], rollout.prompt_ids_N_Q)
    assert torch.equal(seen["attention_mask"].bool(), rollout.prompt_mask_N_Q)
    assert seen["eos_token_id"] == list(llama.end_ids)
    assert rollout.prompts == prompts


def test_lengths_are_checked_with_all_that_is_put_around(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("short\n" + "cat " * 3000 + "\n")
    base = {
        "models": {"generator": str(folders["llama"]), "target": str(folders["gpt2"])},
        "metric": {"name": "norm"},
        "credit": {"mode": "token"},
    }
    with pytest.raises(UsageError, match=r"Prompt and completion take up to [\d,]+ \+ 32 tokens; the context .* 2,048"):
        build(validate({**base, "prompts": {"source": str(tmp_path / "long.txt")}}))
    cut = {"source": str(tmp_path / "long.txt"), "max_tokens": 100}
    assert build(validate({**base, "prompts": cut})).prompts.prompts[0] == "short"
    with pytest.raises(UsageError, match=r"inner.max_length = 161 is more than the context"):
        build(validate({**base, "inner": {"max_length": 161}}))
    with pytest.raises(UsageError, match=r"different tokenisers.*credit\.mode=token"):
        build(validate({**base, "credit": {"mode": "expected"}}))


def test_a_run_says_how_prompts_and_held_out_texts_were_understood(folders: dict[str, Path], tmp_path: Path) -> None:
    """One line each, on the screen and in run.json; the day that the template is given, too."""
    (tmp_path / "ask.jsonl").write_text(
        '{"question": "the cat?", "answer": "a boat"}\n{"question": "a dog?", "answer": "no"}\n'
    )
    (tmp_path / "held.jsonl").write_text('{"prompt": "the old cat", "completion": " sees a boat."}\n')
    built = build(
        validate(
            {
                "models": {"generator": str(folders["llama"]), "target": str(folders["gpt2"])},
                "metric": {"name": "text-loss", "file": str(tmp_path / "held.jsonl")},
                "prompts": {"source": str(tmp_path / "ask.jsonl"), "per_step": 2},
                "credit": {"mode": "token"},
                "rollout": {"max_tokens": 8},
            }
        )
    )
    prompts, held, date = built.notes
    assert prompts == f"{tmp_path / 'ask.jsonl'}: 2 rows (JSON lines), prompt: question"
    assert held.startswith(f"{tmp_path / 'held.jsonl'}: 1 row (JSON lines), trained: completion, context: prompt, ")
    assert date == "the chat template asks for today's date and is given 26 Jul 2024"


def test_trl_writes_prompts_on_the_same_day(llama: LanguageModel) -> None:
    from dpg_cli.driver.trl.trainer import fixed_date

    own = llama.tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}: {{ messages[0]['content'] }}"
    with pytest.raises(RuntimeError, match="stop"), fixed_date(llama.tokenizer):
        text = llama.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
        assert text == "26 Jul 2024: hi"
        assert text == prompt_format(llama.tokenizer, "x", "always", "", 0).write(["hi"])[0]
        raise RuntimeError("stop")
    assert llama.tokenizer.chat_template == own
