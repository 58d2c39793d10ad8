"""own_answers.py on tiny models that name the colours of a picture: whose answers it writes, and what they keep."""

import json
import random
from itertools import product

import pytest
import torch
from PIL import Image
from test_huggingface import PICTURE, processor_for, tiny_hf_vlm

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("trl")
from test_finetune import finetuned, line, turn  # noqa: E402

from data.huggingface import finetune, own_answers  # noqa: E402

COLOURS = {"10": "red", "20": "lime", "30": "blue", "40": "white"}  # words of the processor are numbers
LEFT, RIGHT, BOTH, NEW = "a 0", "a a a 1", "2", "a cat"
# What the base learns. The new answer to NEW is the left colour.
BASE_ANSWERS = {LEFT: "{left}", RIGHT: "{right}", BOTH: "{left} {right}", NEW: "{right}"}
SIDES = list(product(COLOURS, COLOURS))


def picture(left, right, chance):
    """One colour at the left, one at the right, and noise."""
    image = Image.new("RGB", (16, 16), COLOURS[left])
    image.paste(COLOURS[right], (8, 0, 16, 16))
    noise = Image.frombytes("RGB", (16, 16), chance.randbytes(16 * 16 * 3))
    return Image.blend(image, noise, chance.uniform(0.1, 0.4))


def train_base(model, processor):
    """Teaches it BASE_ANSWERS."""
    chance = random.Random(0)
    collate = finetune.DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    batches = []
    for _ in range(40):
        examples = []
        for left, right in SIDES:
            question = chance.choice(list(BASE_ANSWERS))
            answer = BASE_ANSWERS[question].format(left=left, right=right)
            example = json.loads(line([], answer, prompt=[turn("user", question)]))
            examples.append(example | {"images": [picture(left, right, chance)]})
        batches.append(collate(examples))
    steps = 400
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps)
    for step in range(steps):
        optimizer.zero_grad()
        model(**batches[step % len(batches)]).loss.backward()
        optimizer.step()
        schedule.step()


@pytest.fixture(scope="module", params=["Llava", "Qwen2_5_VL"])
def folder(request, tmp_path_factory):
    """A base, questions, and a training file of 64 lines with a new answer to NEW. The last line lacks its end."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    model, processor = tiny_hf_vlm(request.param), processor_for(request.param)
    train_base(model, processor)
    # Real models come with such settings, which are not greedy.
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=5.0)
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    chance = random.Random(1)
    lines = []
    for i, (left, right) in enumerate(SIDES * 4):
        picture(left, right, chance).save(folder / f"{i}.png")
        lines.append(line([f"{i}.png"], left, prompt=[turn("user", NEW)]))
    (folder / "train.jsonl").write_text("\n".join(lines))
    (folder / "questions.txt").write_text(f"{LEFT}\n\n {RIGHT} \n{BOTH}")
    (folder / "text.jsonl").write_text(line([]))
    (folder / "bad.jsonl").write_text(f"{line(['0.png'])}\n{line(['no.png'])}\n")
    (folder / "empty.txt").write_text(" \n")
    (folder / "placeholder.txt").write_text(f"a\n{processor.tokenizer.convert_ids_to_tokens(PICTURE)} a")
    (folder / "latin.txt").write_bytes(b"\xff")
    return folder


def answered(folder, out, options=""):
    """The examples that it writes. The options may override these."""
    defaults = f"--model {folder}/base --train_file {folder}/train.jsonl --questions {folder}/questions.txt"
    defaults += f" --output_file {folder}/{out} --share 0.5"
    own_answers.main(f"{defaults} {options.format(folder)}".split())
    return [json.loads(text) for text in (folder / out).read_text().splitlines() if text]


def greedy_answer(model, processor, path, question):
    """The likeliest next token, again and again, of one prompt without padding or a cache."""
    placeholder = processor.tokenizer.convert_ids_to_tokens(PICTURE)
    image = Image.open(path)
    answer = []
    while "</s>" not in answer:
        text = f"a {placeholder} a {question} {' '.join(answer)}"
        inputs = processor(images=image, text=text, return_tensors="pt", add_special_tokens=False)
        logits = model(**inputs).logits[0, -1]
        logits[PICTURE] = -torch.inf
        answer.append(processor.tokenizer.convert_ids_to_tokens(logits.argmax().item()))
    return " ".join(answer[:-1])


def test_its_lines_are_the_greedy_answers_of_the_base(folder):
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder / "base", dtype=torch.float32)
    processor = transformers.AutoProcessor.from_pretrained(folder / "base")
    examples = answered(folder, "own.jsonl", "--batch_size 5")
    assert len(examples) == 32  # half of the training lines
    for example in examples:
        ((image,), (prompt,), (completion,)) = example["images"], example["prompt"], example["completion"]
        assert prompt["content"] in (LEFT, RIGHT, BOTH)
        assert completion["content"] == greedy_answer(model, processor, folder / image, prompt["content"])


def test_its_images_are_found_from_the_new_file_wherever_that_is(folder):
    (folder / "elsewhere" / "deep").mkdir(parents=True)
    (folder / "link").symlink_to(folder / "elsewhere" / "deep")
    beside = answered(folder, "beside.jsonl")
    for name in ("new", "link"):
        examples = answered(folder, f"{name}/own.jsonl")
        assert len(examples) == len(beside)
        for example, other in zip(examples, beside):
            assert (folder / name / example["images"][0]).samefile(folder / other["images"][0])
            assert example["completion"] == other["completion"]


def test_no_question_about_an_image_is_asked_twice(folder):
    asked = [
        json.dumps([example["images"], example["prompt"]]) for example in answered(folder, "all.jsonl", "--share 9")
    ]
    assert len(set(asked)) == len(asked) == 64 * 3


def test_a_system_prompt_stays_before_the_image(folder):
    system = turn("system", "3 4 5")
    lines = [line(["0.png"], prompt=[system, turn("user", NEW)]), line(["1.png"], prompt=[turn("user", NEW)])]
    (folder / "system.jsonl").write_text("\n".join(lines))
    for example in answered(folder, "with_system.jsonl", "--train_file {}/system.jsonl --share 9"):
        assert example["prompt"][:-1] == ([system] if example["images"] == ["0.png"] else [])
        assert example["prompt"][-1]["role"] == "user"


def test_the_seed_chooses_questions_and_images(folder):
    first, again, other = (answered(folder, f"seed_{name}.jsonl", f"--seed {name[0]}") for name in ("1", "1_", "2"))
    assert first == again
    assert first != other


def test_answers_that_were_cut_off_are_left_out_and_counted(folder, capsys):
    """The answers to BOTH are of two words, and their end is the third token."""
    whole = answered(folder, "whole.jsonl", "--max_new_tokens 3")
    assert "whole.jsonl holds 32 answers. 0 of 32 answers were left out" in capsys.readouterr().out
    short = answered(folder, "short.jsonl", "--max_new_tokens 2")
    assert short == [example for example in whole if example["prompt"][0]["content"] != BOTH]
    left_out = 32 - len(short)
    assert left_out > 0
    assert f"short.jsonl holds {len(short)} answers. {left_out} of 32 answers were left out" in capsys.readouterr().out


def test_a_placeholder_is_never_generated(folder):
    """Here the base would generate one wherever an answer ends."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder / "base")
    processor = transformers.AutoProcessor.from_pretrained(folder / "base")
    model.lm_head.weight.data[PICTURE] = 2 * model.lm_head.weight[processor.tokenizer.eos_token_id]
    model.save_pretrained(folder / "eager" / "base")
    processor.save_pretrained(folder / "eager" / "base")
    assert answered(folder, "eager.jsonl", "--model {}/eager/base") == answered(folder, "calm.jsonl")


def equal_share(answers, others):
    return sum(answer == other for answer, other in zip(answers, others)) / len(others)


def test_finetuning_on_the_mixed_file_learns_the_new_task_and_keeps_more_answers_about_other_images(folder):
    answered(folder, "many.jsonl", "--share 1")  # so many that 100 steps show it
    mixed = (folder / "train.jsonl").read_text() + (folder / "many.jsonl").read_text()  # as cat does
    (folder / "mixed.jsonl").write_text(mixed)
    chance = random.Random(2)
    paths = []
    for i, sides in enumerate(SIDES * 2):
        paths.append(f"{folder}/other_{i}.png")
        picture(*sides, chance).save(paths[-1])
    processor = transformers.AutoProcessor.from_pretrained(folder / "base")

    def answers(model, questions):
        given = []
        for question in questions:
            prompts = [[turn("user", question)]] * len(paths)
            given += own_answers.greedy_answers(model, processor, paths, prompts, max_new_tokens=4)
        return given

    base = transformers.AutoModelForImageTextToText.from_pretrained(folder / "base", dtype=torch.bfloat16)
    kept, learned = {}, {}
    for name in ("train", "mixed"):
        options = f"--train_file {{}}/{name}.jsonl --max_steps 100 --save_strategy no --learning_rate 0.03"
        trainer = finetuned(folder, "image_lora", name, f"{options} --per_device_train_batch_size 8")
        model = trainer.model.eval()
        learned[name] = equal_share(answers(model, [NEW]), [left for left, _ in SIDES * 2])
        kept[name] = equal_share(answers(model, [LEFT, RIGHT, BOTH]), answers(base, [LEFT, RIGHT, BOTH]))
    assert learned["train"] > 0.8
    assert learned["mixed"] > 0.8
    assert kept["mixed"] > kept["train"] + 0.2


BAD_OPTIONS = [
    ("--train_file {}/text.jsonl", "no example of {}/text.jsonl has an image, as own_answers needs"),
    ("--train_file {}/bad.jsonl", "{}/bad.jsonl, line 2: FileNotFoundError"),
    ("--train_file {}/no.jsonl", "No such file"),
    ("--questions {}/empty.txt", "{}/empty.txt holds no question; write one on each line"),
    ("--questions {}/placeholder.txt", "{}/placeholder.txt, line 2: a question contains "),
    ("--questions {}/latin.txt", "{}/latin.txt, line 1: 'utf-8' codec can't decode"),
    ("--questions {}/no.txt", "No such file"),
    ("--output_file {}/train.jsonl", "{}/train.jsonl is there already; remove it, or choose another --output_file"),
    ("--max_new_tokens 1", "no answer is left"),
]


def test_what_it_cannot_do_is_refused_in_one_sentence_and_nothing_is_written(folder, capsys):
    train = (folder / "train.jsonl").read_text()
    for options, sentence in BAD_OPTIONS:
        with pytest.raises(SystemExit) as refused:
            answered(folder, "refused.jsonl", options)
        assert refused.value.code == 2
        assert sentence.format(folder) in capsys.readouterr().err.splitlines()[-1]
        assert not (folder / "refused.jsonl").exists()
    assert (folder / "train.jsonl").read_text() == train
