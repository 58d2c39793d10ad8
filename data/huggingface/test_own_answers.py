"""own_answers.py on tiny models that name the colours of a picture: whose answers it writes, and what they keep."""

import json
import random
from itertools import product

import pytest
import torch
from PIL import Image
from test_huggingface import PICTURE, processor_for, tiny_hf_vlm

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("peft")
pytest.importorskip("trl")
from test_finetune import finetuned, line, turn  # noqa: E402

from data.huggingface import finetune, own_answers  # noqa: E402

COLOURS = {"10": "red", "20": "lime", "30": "blue", "40": "white"}  # words of the processor are numbers
SIDES = list(product(COLOURS, COLOURS)) * 4  # the left and the right colour of each picture; files name the first 32
LEFT, BOTH, NEW = "a 0", "a a a 1", "a cat"
BASE_ANSWERS = {LEFT: "{0}", BOTH: "{0} {1}", NEW: "{1}"}  # the new answer to NEW is {0}


def save_picture(path, sides, chance):
    """Two colours side by side, with noise, lying on its side as a camera would store it."""
    image = Image.new("RGB", (16, 16), COLOURS[sides[0]])
    image.paste(COLOURS[sides[1]], (8, 0, 16, 16))
    noise = Image.frombytes("RGB", (16, 16), chance.randbytes(16 * 16 * 3))
    image = Image.blend(image, noise, chance.uniform(0.1, 0.4))
    exif = Image.Exif()
    exif[0x0112] = 6  # says how to turn it back
    image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)


def read_file(folder, file):
    """The examples of a file as finetune.py reads them, and its collator."""
    processor = finetune.load_processor(folder / "base")
    placeholder = processor.tokenizer.convert_ids_to_tokens(PICTURE)
    collate = finetune.DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    return finetune.read_file(folder / file, "own_answers", placeholder), collate


@pytest.fixture(scope="module", params=["Llava", "Qwen2_5_VL"])
def folder(request, tmp_path_factory):
    """A base that has learned BASE_ANSWERS, questions, and a training file whose last line lacks its end."""
    folder = tmp_path_factory.mktemp(request.param)
    chance = random.Random(0)
    for i, sides in enumerate(SIDES):
        save_picture(folder / f"{i}.png", sides, chance)
    lines = {"train": [], "base": []}
    for i, sides in enumerate(SIDES[:32]):
        lines["train"].append(line([f"{i}.png"], sides[0], prompt=[turn("user", NEW)]))
        for question, answer in BASE_ANSWERS.items():
            lines["base"].append(line([f"{i}.png"], answer.format(*sides), prompt=[turn("user", question)]))
    for name in lines:
        (folder / f"{name}.jsonl").write_text("\n".join(lines[name]))
    (folder / "questions.txt").write_text(f"{LEFT}\n\n {BOTH} \n")

    processor = processor_for(request.param)
    processor.tokenizer.bos_token = "<s>"  # the chat template lacks it, as in LLaVA-1.5
    processing = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    processor.tokenizer.backend_tokenizer.post_processor = processing
    processor.save_pretrained(folder / "base")
    examples, collate = read_file(folder, "base.jsonl")
    batch = collate(list(examples))
    model = tiny_hf_vlm(request.param)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(60):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    # Real models come with such settings, which are not greedy.
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=5.0)
    model.save_pretrained(folder / "base")
    return folder


def answered(folder, out, options=""):
    """The lines that it writes. The options may override these."""
    defaults = f"--model {folder}/base --train_file {folder}/train.jsonl --questions {folder}/questions.txt"
    defaults += f" --output_file {folder}/{out} --share 0.5"
    own_answers.main(f"{defaults} {options.format(folder)}".split())
    return [json.loads(text) for text in (folder / out).read_text().splitlines() if text]


def greedy_answer(model, processor, image, question):
    """The likeliest next token, again and again, of one prompt without padding or a cache."""
    placeholder = processor.tokenizer.convert_ids_to_tokens(PICTURE)
    answer = []
    while "</s>" not in answer:
        text = f"<s> a {placeholder} a {question} {' '.join(answer)}"
        inputs = processor(images=image, text=text, return_tensors="pt", add_special_tokens=False)
        token = model(**inputs).logits[0, -1].argmax().item()
        answer.append(processor.tokenizer.convert_ids_to_tokens(token))
    return " ".join(answer[:-1])


def test_its_lines_are_the_greedy_answers_of_the_base_wherever_the_new_file_is(folder):
    (folder / "elsewhere" / "deep").mkdir(parents=True)
    (folder / "link").symlink_to(folder / "elsewhere" / "deep")
    answered(folder, "link/own.jsonl", "--batch_size 5")
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder / "base", dtype=torch.float32)
    processor = transformers.AutoProcessor.from_pretrained(folder / "base")
    examples, _ = read_file(folder, "link/own.jsonl")
    assert len(examples) == 16  # half of the training lines
    for example in examples:
        ((image,), (prompt,), (completion,)) = example["images"], example["prompt"], example["completion"]
        assert prompt["content"] in (LEFT, BOTH)
        assert completion["content"] == greedy_answer(model, processor, image, prompt["content"])


def test_the_base_is_shown_what_training_will_show(folder, monkeypatch):
    """The same pixels and tokens: one BOS token, and a system prompt before the image."""
    system = turn("system", "3 4 5")
    lines = [line(["0.png"], prompt=[system, turn("user", NEW)]), line(["1.png"], prompt=[turn("user", NEW)])]
    (folder / "system.jsonl").write_text("\n".join(lines))
    calls = []
    generate = transformers.GenerationMixin.generate

    def recorded_generate(model, **inputs):
        calls.append(inputs)
        return generate(model, **inputs)

    monkeypatch.setattr(transformers.GenerationMixin, "generate", recorded_generate)
    written = answered(folder, "shown.jsonl", "--train_file {}/system.jsonl --share 1 --batch_size 1")
    prompts = {example["images"][0]: example["prompt"][:-1] for example in written}
    assert prompts == {"0.png": [system], "1.png": []}
    examples, collate = read_file(folder, "shown.jsonl")
    for example, inputs in zip(examples, calls):
        shown = collate([example])
        tokens = inputs["input_ids"]
        assert torch.equal(tokens, shown["input_ids"][:, : tokens.shape[1]])
        assert torch.equal(inputs["pixel_values"], shown["pixel_values"])


def test_the_seed_chooses_lines_and_questions(folder):
    first, again, other = (answered(folder, f"seed_{name}.jsonl", f"--seed {name[0]}") for name in ("1", "1_", "2"))
    assert first == again
    assert first != other


def test_answers_that_were_cut_off_are_left_out_and_counted(folder, capsys):
    """The answers to BOTH are of two words, and their end is the third token."""
    whole = answered(folder, "whole.jsonl", "--max_new_tokens 3")
    short = answered(folder, "short.jsonl", "--max_new_tokens 2")
    assert len(whole) == 16
    assert short == [example for example in whole if example["prompt"][0]["content"] == LEFT]
    assert f"{len(short)} answers; {16 - len(short)} others were longer" in capsys.readouterr().out
    assert len(short) < 16


def test_a_placeholder_is_never_generated(folder):
    """Here the base would generate one wherever an answer ends."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder / "base")
    processor = transformers.AutoProcessor.from_pretrained(folder / "base")
    model.lm_head.weight.data[PICTURE] = 2 * model.lm_head.weight[processor.tokenizer.eos_token_id]
    model.save_pretrained(folder / "eager" / "base")
    processor.save_pretrained(folder / "eager" / "base")
    assert answered(folder, "eager.jsonl", "--model {}/eager/base") == answered(folder, "calm.jsonl")


def share_right(folder, model, question, answer):
    """The share of right answers about the pictures that no file names."""
    processor = finetune.load_processor(folder / "base")
    prompt = [turn("user", question)]
    examples = [{"images": [{"path": f"{folder}/{i}.png"}], "prompt": prompt} for i in range(32, 64)]
    answers = own_answers.greedy_answers(model, processor, examples, max_new_tokens=4)
    return sum(given == answer.format(*sides) for given, sides in zip(answers, SIDES[32:])) / 32


def test_finetuning_on_the_mixed_file_learns_the_new_task_and_keeps_more_answers_about_other_images(folder):
    answered(folder, "many.jsonl", "--share 1")  # so many that 60 steps show it
    mixed = (folder / "train.jsonl").read_text() + (folder / "many.jsonl").read_text()  # as cat does
    (folder / "mixed.jsonl").write_text(mixed)
    learned, kept = {}, {}
    for name in ("train", "mixed"):
        options = f"--train_file {{}}/{name}.jsonl --max_steps 60 --save_strategy no --learning_rate 0.05"
        model = finetuned(folder, "image_lora", name, f"{options} --per_device_train_batch_size 8").model.eval()
        learned[name] = share_right(folder, model, NEW, "{0}")
        kept[name] = share_right(folder, model, BOTH, "{0} {1}")
    assert learned["train"] > 0.6
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
