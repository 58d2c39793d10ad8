"""finetune.py and answers.py on tiny models: what is learned, saved, shown, asked and refused."""

import json
from itertools import product
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from PIL import Image
from test_huggingface import PICTURE, START, TEXT, VIDEO, processor_for, tiny_hf_vlm

import imagelora
from test_imagelora import logits_of

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl")
sft = pytest.importorskip("trl.trainer.sft_trainer")
tokenizers = pytest.importorskip("tokenizers")
import answers  # noqa: E402
import examples  # noqa: E402
import finetune  # noqa: E402
from partial_lora import load_partial_lora  # noqa: E402

COLOURS = {"10": "#f000", "20": "#0f00", "30": "#00f0", "40": "#fff0"}  # transparent, which a careless reader keeps
LEFT, BOTH, NOTHING, LOOP, NEW = "a 0", "a a a 1", "a 2", "a 4", "a cat"
BASE_ANSWERS = {LEFT: "{0}", BOTH: "{0} {1} 3", NOTHING: " ", LOOP: "cat " * 5, NEW: "{1}"}  # {0} is the left colour
SYSTEM, USER, ASSISTANT = ({"role": role, "content": "a 3"} for role in ("system", "user", "assistant"))


def example(images, question=NEW, answer="10", system=(), **changes):
    prompt = [*system, {"role": "user", "content": question}]
    return {"images": images, "prompt": prompt, "completion": [{"role": "assistant", "content": answer}]} | changes


def write(file, lines):
    """As an editor of Windows may write it: with a byte-order mark, CRLF and empty lines."""
    lines = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    file.write_bytes(("\ufeff" + "\r\n\r\n".join(lines) + "\r\n").encode())


def tiny_processor(family):
    """Knows a few words. Qwen3.5 has its own chat template, which opens a thought, and a tokenizer that keeps spaces."""
    if family == "Llava":
        processor = processor_for("Llava")
        processor.tokenizer.bos_token = "<s>"
        begin = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
        processor.tokenizer.backend_tokenizer.post_processor = begin
        processor.chat_template = "<s> " + processor.chat_template
        return processor
    words = ["<pad>", "<|endoftext|>", "<|im_end|>", "<unk>", "<|im_start|>", "<think>", "</think>", "system", "user"]
    words += ["assistant", "a", "cat", " ", "\n", "\n\n", *map(str, range(60))]
    marks = {"<|image_pad|>": PICTURE, "<|video_pad|>": VIDEO, "<|vision_start|>": START, "<|vision_end|>": 93}
    vocabulary = {word: i for i, word in enumerate(words)} | marks
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    pattern = tokenizers.Regex(r"<\|?/?\w+\|?>|\w+|\n\n|[\s\S]")
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(pattern, "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    options = {"pad_token": "<pad>", "eos_token": "<|im_end|>", "additional_special_tokens": list(marks)}
    options["model_input_names"] = ["input_ids", "attention_mask"]
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **options)
    sizes = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 64}
    pictures, videos = transformers.Qwen2VLImageProcessor(**sizes), transformers.Qwen3VLVideoProcessor(**sizes)
    template = (Path(trl.__file__).parent / "chat_templates/qwen3_5_think.jinja").read_text()
    return transformers.Qwen3VLProcessor(pictures, tokenizer, videos, chat_template=template)


@pytest.fixture(scope="module", params=["Llava", "Qwen3_5"])
def folder(request, tmp_path_factory):
    """A base that has learned BASE_ANSWERS, its processor, photos that are turned by a quarter, and files."""
    folder = tmp_path_factory.mktemp(request.param)
    new_task, base = [], []
    exif = Image.Exif()
    exif[0x0112] = 6
    for i, (left, right) in enumerate(product(COLOURS, COLOURS)):
        image = Image.new("RGBA", (16, 16), COLOURS[left])
        image.paste(COLOURS[right], (8, 0, 16, 16))
        image.transpose(Image.Transpose.ROTATE_90).save(folder / f"{i}.png", exif=exif)
        new_task.append(example([f"{i}.png"], NEW, f"{left} "))  # not what the base answers, and with a space
        for question, answer in BASE_ANSWERS.items():
            paths = [str(folder / f"{i}.png")]
            base.append(example(paths, question, answer.format(left, right), [SYSTEM] * (i % 2)))
    Image.new("I;16", (8, 8)).save(folder / "deep.png")
    write(folder / "train.jsonl", new_task)
    write(folder / "rare.jsonl", [example([])] * 40 + new_task[:2])
    write(folder / "base.jsonl", [line for line in base if line["completion"][0]["content"].strip()])

    processor = tiny_processor(request.param)
    processor.save_pretrained(folder / "processor")
    end = processor.tokenizer.eos_token
    processor.chat_template = processor.chat_template.replace(end, "")
    processor.save_pretrained(folder / "no_end")
    model = tiny_hf_vlm(request.param)
    batch = batch_of(folder, [*base, example([])])
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(120):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=5.0)  # real ones come with such
    model.save_pretrained(folder / "base")
    return folder


def processor_of(folder):
    return transformers.AutoProcessor.from_pretrained(folder)


def base_of(folder):
    return transformers.AutoModelForImageTextToText.from_pretrained(folder / "base", dtype=torch.bfloat16)


def batch_of(folder, some):
    """These examples as training shows them to the model."""
    collate = sft.DataCollatorForVisionLanguageModeling(processor_of(folder / "processor"), completion_only_loss=True)
    return collate(list(examples.as_dataset(some)))


def train(folder, method, out, options=""):
    """The trainer after a few steps. The options may override these."""
    defaults = f"--method {method} --model {folder}/base --processor {folder}/processor --output_dir {folder}/{out}"
    defaults += f" --train_files {folder}/train.jsonl --use_cpu true --learning_rate 0.02 --max_steps 1"
    return finetune.main(f"{defaults} --per_device_train_batch_size 16 {options.replace('{}', str(folder))}".split())


def refusal(capsys, *start):
    """What a start says that is refused."""
    with pytest.raises(SystemExit) as stop:
        train(*start)
    return f"{stop.value} {capsys.readouterr().err}"


@pytest.mark.parametrize("method", ["image_lora", "lora", "partial_lora"])
def test_a_model_learns_its_examples_and_answers_them_right_when_it_is_asked(folder, method, capsys):
    """The run shows an example as the model gets it, and goes on from a checkpoint bit by bit. Its result loads onto a
    fresh base. Without an image its output is the base's, except with LoRA; at a gamma of 0 all its answers are."""
    options = "--max_steps 40 --save_steps 20 --eval_files {}/train.jsonl --lr_scheduler_type constant"
    trainer = train(folder, method, method, options)
    shown = capsys.readouterr().out
    assert "train.jsonl, line 1: the model gets '" in shown
    assert "16 examples, 16 with images; 16 are prepared" in shown
    assert f"{method} adapts {'v_proj' if method == 'image_lora' else 'q_proj, k_proj, v_proj, o_proj'} in 2 of" in shown
    assert [entry["eval_mean_token_accuracy"] for entry in trainer.state.log_history if "eval_loss" in entry][-1] == 1
    resumption = train(folder, method, method, f"{options} --resume_from_checkpoint {{}}/{method}/checkpoint-20")
    assert all(map(torch.equal, trainer.model.parameters(), resumption.model.parameters()))
    (weights,) = (folder / method / "checkpoint-20").glob("*.safetensors")
    assert weights.stat().st_size < (folder / "base/model.safetensors").stat().st_size / 3  # it has no base

    model = base_of(folder)
    text = logits_of(model, TEXT)
    new = examples.read_examples(folder / "train.jsonl")
    by_base = answers.answer(model, processor_of(folder / "processor"), new, batch_size=5)
    if method == "image_lora":
        imagelora.load(model, folder / method / "adapter.pt")
    else:
        model = (peft.PeftModel.from_pretrained if method == "lora" else load_partial_lora)(model, folder / method)
    assert torch.equal(logits_of(model, TEXT), text) == (method != "lora")
    processor = processor_of(folder / method)
    expected = [line["completion"][0]["content"].strip() for line in new]
    assert answers.answer(model, processor, new, batch_size=5) == expected
    with answers.at_gamma(model, 0.0):
        assert answers.answer(model, processor, new, batch_size=5) == by_base != expected
