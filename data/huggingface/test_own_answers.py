"""own_answers.py on tiny models that name the colours of a picture: whose answers it writes, and what they keep."""

import json
import shutil
from itertools import product
from unittest.mock import patch

import pytest
import torch
from PIL import Image
from test_finetune import finetuned, line, tokenizers, transformers, turn  # skips these tests if a package is missing
from test_huggingface import PICTURE, processor_for, tiny_hf_vlm

from data.huggingface import finetune, own_answers

COLOURS = {"10": "red", "20": "lime", "30": "blue", "40": "white"}  # words of the processor are numbers
LEFT, BOTH, NEW = "a 0", "a a a 1", "a cat"
BASE_ANSWERS = {LEFT: "{0}", BOTH: "{0} {1}", NEW: "{1}"}  # {0} is the colour at the left, and the new answer to NEW
SYSTEM = turn("system", "3 4 5")
BOS = 1


def batch_of(folder, file):
    """A file as finetune.py shows it to the model."""
    processor = finetune.load_processor(folder / "base")
    placeholder = processor.tokenizer.convert_ids_to_tokens(PICTURE)
    examples = list(finetune.read_file(folder / file, "own_answers", placeholder))
    return finetune.DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)(examples)


def is_greedy(model, batch):
    """Whether each token of a completion is the likeliest after those before it, for each example."""
    likeliest = model(**batch).logits[:, :-1].argmax(-1)
    labels = batch["labels"][:, 1:]
    return ((likeliest == labels) | (labels == -100)).all(1)


@pytest.fixture(scope="module", params=["Llava", "Qwen2_5_VL"])
def folder(request, tmp_path_factory):
    """A base that has learned BASE_ANSWERS, questions, and a training file whose last line lacks image and newline."""
    folder = tmp_path_factory.mktemp(request.param)
    train, base = [], []
    for i, (left, right) in enumerate(product(COLOURS, COLOURS)):
        image = Image.new("RGB", (16, 16), COLOURS[left])
        image.paste(COLOURS[right], (8, 0, 16, 16))
        exif = Image.Exif()
        exif[0x0112] = 6  # turned by a quarter, as a camera may store it
        image.transpose(Image.Transpose.ROTATE_90).save(folder / f"{i}.png", exif=exif)
        system = [SYSTEM] if i == 0 else []
        earlier = [turn("user", NEW), turn("assistant", left)] if i == 1 else []
        train.append(line([f"{i}.png"], left, prompt=[*system, *earlier, turn("user", NEW)]))
        for question, answer in BASE_ANSWERS.items():
            base.append(line([f"{i}.png"], answer.format(left, right), prompt=[*system, turn("user", question)]))
    (folder / "train.jsonl").write_text("\n".join([*train, line([])]))
    (folder / "base.jsonl").write_text("\n".join(base))
    (folder / "questions.txt").write_text(f"{LEFT}\n\n {BOTH} \n")

    processor = processor_for(request.param)
    processor.tokenizer.bos_token = "<s>"  # the chat template lacks it, as that of LLaVA-1.5 does
    processing = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", BOS)])
    processor.tokenizer.backend_tokenizer.post_processor = processing
    processor.save_pretrained(folder / "base")
    model = tiny_hf_vlm(request.param)
    batch = batch_of(folder, "base.jsonl")
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(100):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    # Real models come with such settings, which are not greedy.
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=5.0)
    model.save_pretrained(folder / "base")
    return folder


def answered(folder, out, options=""):
    """The lines that it writes, one for each training line with an image. The options may override these."""
    defaults = f"--model {folder}/base --train_file {folder}/train.jsonl --questions {folder}/questions.txt"
    own_answers.main(f"{defaults} --output_file {folder}/{out} --share 1 {options.format(folder)}".split())
    return [json.loads(text) for text in (folder / out).read_text().splitlines() if text]


def test_its_lines_are_the_greedy_answers_of_the_base_to_what_training_will_show(folder):
    """The images are found from the new file, system prompts stay and earlier turns do not, and one BOS token begins a
    prompt."""
    (folder / "new" / "folder").mkdir(parents=True)
    (folder / "link").symlink_to(folder / "new" / "folder")
    generate = transformers.GenerationMixin.generate
    with patch.object(transformers.GenerationMixin, "generate", autospec=True, side_effect=generate) as calls:
        examples = answered(folder, "link/own.jsonl", "--batch_size 5")
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder / "base", dtype=torch.float32)
    assert is_greedy(model, batch_of(folder, "link/own.jsonl")).tolist() == [True] * 16
    assert {example["prompt"][-1]["content"] for example in examples} == {LEFT, BOTH}
    for example in examples:
        assert example["prompt"][:-1] == ([SYSTEM] if example["images"] == ["../../0.png"] else [])
    for call in calls.call_args_list:
        assert ((call.kwargs["input_ids"] == BOS).sum(1) == 1).all()


def test_the_seed_chooses_as_many_images_as_the_share_says(folder):
    first = {example["images"][0] for example in answered(folder, "first.jsonl", "--share 0.5 --seed 1")}
    other = {example["images"][0] for example in answered(folder, "other.jsonl", "--share 0.5 --seed 2")}
    assert len(first) == len(other) == 8
    assert first != other


def test_answers_that_were_cut_off_are_left_out_and_counted(folder, capsys):
    """The answers to BOTH are of two words, and their end is the third token."""
    whole = answered(folder, "whole.jsonl", "--max_new_tokens 3")
    short = answered(folder, "short.jsonl", "--max_new_tokens 2")
    assert short == [example for example in whole if example["prompt"][-1]["content"] == LEFT]
    assert f"{len(short)} answers; {16 - len(short)} others were longer" in capsys.readouterr().out


def test_a_placeholder_is_never_generated(folder):
    """Here the base would generate one wherever an answer ends."""
    shutil.copytree(folder / "base", folder / "eager_base")
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder / "base")
    model.lm_head.weight.data[PICTURE] = 2 * model.lm_head.weight[model.generation_config.eos_token_id]
    model.save_pretrained(folder / "eager_base")
    assert answered(folder, "eager.jsonl", "--model {}/eager_base") == answered(folder, "calm.jsonl")


def test_finetuning_on_the_mixed_file_learns_the_new_task_and_keeps_more_of_the_other_answers(folder):
    answered(folder, "own.jsonl")
    mixed = (folder / "train.jsonl").read_text() + (folder / "own.jsonl").read_text()  # as cat does
    (folder / "mixed.jsonl").write_text(mixed)
    (folder / "both.txt").write_text(BOTH)
    answered(folder, "both.jsonl", "--questions {}/both.txt")
    learned, kept = {}, {}
    for name in ("train", "mixed"):
        options = f"--train_file {{}}/{name}.jsonl --max_steps 70 --save_strategy no --learning_rate 0.05"
        model = finetuned(folder, "image_lora", name, f"{options} --per_device_train_batch_size 8").model.eval()
        learned[name] = is_greedy(model, batch_of(folder, "train.jsonl")).float().mean()
        kept[name] = is_greedy(model, batch_of(folder, "both.jsonl")).float().mean()
    assert learned["mixed"] > 0.6
    assert kept["mixed"] > kept["train"] + 0.2


BAD_OPTIONS = [
    ("--train_file {}/text.jsonl", "no example of {}/text.jsonl has an image, as own_answers needs"),
    ("--train_file {}/no.jsonl", "No such file"),
    ("--questions {}/empty.txt", "{}/empty.txt needs a question on each line"),
    ("--questions {}/placeholder.txt", "{}/placeholder.txt needs a question on each line, and none may contain <"),
    ("--questions {}/no.txt", "No such file"),
    ("--output_file {}/train.jsonl", "{}/train.jsonl is there already"),
    ("--output_file {}/no/own.jsonl", "choose another --output_file"),
    ("--max_new_tokens 1", "no answer is left"),
]


def test_what_it_cannot_do_is_refused_in_one_sentence_and_nothing_is_written(folder, capsys):
    (folder / "text.jsonl").write_text(line([]))
    (folder / "empty.txt").write_text(" \n")
    (folder / "placeholder.txt").write_text("a\n<image><|image_pad|> a")
    files = {path: path.read_bytes() for path in folder.glob("*.*")}
    for options, sentence in BAD_OPTIONS:
        with pytest.raises(SystemExit) as refused:
            answered(folder, "refused.jsonl", options)
        assert refused.value.code == 2
        assert sentence.format(folder) in capsys.readouterr().err.splitlines()[-1]
    assert files == {path: path.read_bytes() for path in folder.glob("*.*")}
