"""finetune.py on tiny models: what it learns, saves, shows and refuses, and whose answers own_answers() writes."""

import json
from itertools import product
from unittest.mock import patch

import pytest
import torch
from PIL import Image
from test_huggingface import PICTURE, TEXT, processor_for, tiny_hf_vlm

import imagelora
from test_imagelora import logits_of

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
sft = pytest.importorskip("trl.trainer.sft_trainer")
tokenizers = pytest.importorskip("tokenizers")
import finetune  # noqa: E402
from partial_lora import load_partial_lora  # noqa: E402

COLOURS = {"10": "#f000", "20": "#0f00", "30": "#00f0", "40": "#fff0"}  # transparent; the processor knows numbers
LEFT, BOTH, NEW = "a 0", "a a a 1", "a cat"
BASE_ANSWERS = {LEFT: "{0}", BOTH: "{0} <s> {1}", NEW: "{1}"}  # {0} is the first colour, and what NEW shall get


def line(images, question, answer, system=()):
    prompt = [*system, {"role": "user", "content": question}]
    return {"images": images, "prompt": prompt, "completion": [{"role": "assistant", "content": answer}]}


def batch_of(folder, file):
    """A file as finetune.py shows it to the model."""
    processor = transformers.AutoProcessor.from_pretrained(folder / "base")
    collate = sft.DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    return collate(list(finetune.read([folder / file])))


@pytest.fixture(scope="module", params=["Llava", "Qwen2_5_VL"])
def folder(request, tmp_path_factory):
    """A base that has learned BASE_ANSWERS, questions, and training files. Its texts begin with a BOS token."""
    folder = tmp_path_factory.mktemp(request.param)
    train, base, exif = [], [], Image.Exif()
    exif[0x0112] = 6  # turned by a quarter, as a camera may store it
    for i, (first, second) in enumerate(product(COLOURS, COLOURS)):
        image = Image.new("RGBA", (16, 16), COLOURS[first])
        image.paste(COLOURS[second], (8, 0, 16, 16))
        image.save(folder / f"{i}.png", exif=exif)
        train.append(line([f"{i}.png"], NEW, first))
        system = [{"role": "system", "content": "3 4 5"}] * (i % 2)
        base += [line([f"{i}.png"], q, answer.format(first, second), system) for q, answer in BASE_ANSWERS.items()]
    for name, lines in {"train": train, "base": base, "rare": [line([], NEW, "a")] * 40 + train[:2]}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "questions.txt").write_bytes(f"\ufeff{LEFT}\r\n\r\n {BOTH} \r\n".encode())  # as of Windows' Notepad

    processor = processor_for(request.param)
    processor.tokenizer.bos_token = "<s>"
    processing = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    processor.tokenizer.backend_tokenizer.post_processor = processing
    processor.chat_template = "<s> " + processor.chat_template
    processor.save_pretrained(folder / "base")
    model = tiny_hf_vlm(request.param)
    batch = batch_of(folder, "base.jsonl")
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(100):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=5.0)  # real ones come with such
    model.save_pretrained(folder / "base")
    return folder


def tuned(folder, method, out, options=""):
    """The trainer after four epochs of two steps. The options may override these."""
    defaults = f"--method {method} --model {folder}/base --train_files {folder}/train.jsonl --output_dir {folder}/{out}"
    defaults += " --use_cpu true --learning_rate 0.02 --per_device_train_batch_size 8 --num_train_epochs 4"
    return finetune.main(f"{defaults} --save_strategy epoch {options.format(folder)}".split())


def own(folder, out, **options):
    finetune.own_answers(*(folder / name for name in ("base", "base.jsonl", "questions.txt", out)), one_in=1, **options)


@pytest.mark.parametrize("method", ["image_lora", "lora", "partial_lora"])
def test_a_run_learns_goes_on_from_a_checkpoint_and_its_result_loads_and_leaves_text_alone(folder, method):
    trainer = tuned(folder, method, method, "--eval_files {}/train.jsonl")
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0]
    again = tuned(folder, method, f"again_{method}", f"--resume_from_checkpoint {{}}/{method}/checkpoint-4")
    assert all(map(torch.equal, trainer.model.parameters(), again.model.parameters()))
    (weights,) = (folder / method / "checkpoint-4").glob("*.safetensors")
    assert weights.stat().st_size < (folder / "base/model.safetensors").stat().st_size / 3

    model = transformers.AutoModelForImageTextToText.from_pretrained(folder / "base", dtype=torch.bfloat16)
    text = logits_of(model, TEXT)
    if method == "image_lora":
        imagelora.load(model, folder / method / "adapter.pt")
    else:
        model = (peft.PeftModel.from_pretrained if method == "lora" else load_partial_lora)(model, folder / method)
    assert torch.equal(logits_of(model, TEXT), text) == (method != "lora")
    batch = batch_of(folder, "base.jsonl")
    assert torch.equal(logits_of(model, batch), logits_of(trainer.model.eval(), batch))


def test_the_probe_finds_rare_images_and_the_best_checkpoint_becomes_the_result(folder, capsys):
    options = "--train_files {0}/rare.jsonl --eval_files {0}/base.jsonl --num_heads 3 --load_best_model_at_end true"
    options += " --eval_strategy epoch --learning_rate 0.05 --per_device_train_batch_size 1 --num_train_epochs 2"
    trainer = tuned(folder, "image_lora", "best", options)
    assert "3 heads, the best of 4 by the probe: {0: [" in capsys.readouterr().out
    assert sum(map(len, trainer.model.image_lora.heads.values())) == 3
    assert trainer.state.best_model_checkpoint.endswith("-42")  # the first one
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric


def test_an_example_is_shown_and_a_template_without_begin_or_end_and_a_used_folder_are_refused(folder, capsys):
    processor = tuned(folder, "lora", "shown", "--max_steps 1").processing_class
    picture = processor.decode([PICTURE])
    assert f"example: '<s> a {picture} a a cat 10 </s>'\nWhat is learned of it: '10 </s>'" in capsys.readouterr().out
    for bad in (processor.chat_template.removeprefix("<s>"), processor.chat_template.replace("</s>", "")):
        (folder / "bad.jinja").write_text(bad)
        with pytest.raises(SystemExit, match=r"It must begin with '<s>' and end with one of \['</s>'\]"):
            tuned(folder, "lora", "refused", "--chat_template_path {}/bad.jinja")
    with pytest.raises(SystemExit, match="shown holds an earlier run"):
        tuned(folder, "image_lora", "shown")
    pytest.raises(SystemExit, finetune.main, "--method lora --model m --train_files t".split())  # no learning rate


def test_own_answers_are_the_greedy_ones_to_what_training_shows_and_each_is_written_at_once(folder):
    generate, asked, out = transformers.GenerationMixin.generate, [], folder.with_suffix(".jsonl")

    def watched(model, **inputs):
        assert model.generation_config.suppress_tokens == [PICTURE]
        assert out.read_text().count("\n") == len(asked)
        asked.append(inputs)
        return generate(model, **inputs)

    with patch.object(transformers.GenerationMixin, "generate", watched):
        own(folder, out)
    prompts = [example["prompt"] for example in finetune.read([out])]
    assert {(prompt[-1]["content"], len(prompt)) for prompt in prompts} == set(product((LEFT, BOTH), (1, 2)))
    batch = batch_of(folder, out)
    assert torch.equal(batch["pixel_values"], torch.cat([inputs["pixel_values"] for inputs in asked]))
    for ids, inputs in zip(batch["input_ids"], asked):
        assert ids.tolist()[: inputs["input_ids"].shape[1]] == inputs["input_ids"][0].tolist()
    trainer = tuned(folder, "lora", "base_again", f"--eval_files {out} --eval_on_start true --max_steps 1")
    assert trainer.state.log_history[0]["eval_mean_token_accuracy"] == 1  # before its first step it is the base


def test_own_answers_keep_more_of_what_the_base_knows_and_those_cut_off_are_left_out(folder):
    own(folder, "own.jsonl")
    pytest.raises(FileExistsError, own, folder, "own.jsonl")
    own(folder, "short.jsonl", max_new_tokens=3)
    assert [len(finetune.read([folder / name])) for name in ("own.jsonl", "short.jsonl")] == [48, 24]
    losses = []
    for name, more in (("alone", ""), ("joined", "{0}/own.jsonl")):
        options = f"--train_files {{0}}/train.jsonl {more} --max_steps 70 --learning_rate 0.05 --save_strategy no"
        trainer = tuned(folder, "image_lora", name, f"{options} --eval_files {{0}}/own.jsonl --eval_strategy steps")
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[1] < losses[0] / 2
