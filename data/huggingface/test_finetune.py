"""finetune.py and examples.py on tiny models: what is learned, saved, shown, asked and refused."""

import json
from itertools import product
from unittest.mock import patch

import pytest
import torch
from PIL import Image
from test_huggingface import PICTURE, TEXT, VIDEO, processor_for, tiny_hf_vlm

import imagelora
from test_imagelora import logits_of

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl")
sft = pytest.importorskip("trl.trainer.sft_trainer")
tokenizers = pytest.importorskip("tokenizers")
import examples  # noqa: E402
import finetune  # noqa: E402
from partial_lora import load_partial_lora  # noqa: E402
from peft.helpers import rescale_adapter_scale  # noqa: E402

processor_of = transformers.AutoProcessor.from_pretrained
COLOURS = {"10": "#f000", "20": "#0f00", "30": "#00f0", "40": "#fff0"}  # transparent, which a careless reader keeps
LEFT, BOTH, NOTHING, LOOP, NEW = "a 0", "a a a 1", "a 2", "a 4", "a cat"
BASE_ANSWERS = {LEFT: "{0}", BOTH: "{0} {1} 3", NOTHING: " ", LOOP: "cat " * 5, NEW: "{1}"}  # {0} is the left colour
SYSTEM = {"role": "system", "content": "a 3"}


def example(images, question=NEW, answer="10", system=(), **changes):
    prompt = [*system, {"role": "user", "content": question}]
    return {"images": images, "prompt": prompt, "completion": [{"role": "assistant", "content": answer}]} | changes


def write(file, lines):
    """As an editor of Windows may write it: with a byte-order mark, CRLF and empty lines."""
    lines = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    file.write_bytes(("\ufeff" + "\r\n\r\n".join(lines) + "\r\n").encode())


def tiny_processor(family):
    processor = processor_for(family)
    if family == "Llava":
        processor.tokenizer.bos_token = "<s>"
        begin = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
        processor.tokenizer.backend_tokenizer.post_processor = begin
        processor.chat_template = "<s> " + processor.chat_template
    return processor


@pytest.fixture(scope="module", params=["Llava", "Qwen3_5"])
def folder(request, tmp_path_factory):
    """A base that has learned BASE_ANSWERS, its processor, pictures, and files."""
    folder = tmp_path_factory.mktemp(request.param)
    new_task, base = [], []
    for i, (left, right) in enumerate(product(COLOURS, COLOURS)):
        image = Image.new("RGBA", (16, 16), COLOURS[left])
        image.paste(COLOURS[right], (8, 0, 16, 16))
        image.save(folder / f"{i}.png")
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
    processor.chat_template = processor.chat_template.replace(processor.tokenizer.eos_token, "")
    processor.save_pretrained(folder / "no_end")
    model = tiny_hf_vlm(request.param)
    collate = sft.DataCollatorForVisionLanguageModeling(tiny_processor(request.param), completion_only_loss=True)
    parts = [[*base[start::7], example([])] for start in range(7)]
    batches = [collate(list(examples.as_dataset(part))) for part in parts]
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(210):
        model(**batches[step % 7]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    # Real ones come with such settings.
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=5.0, suppress_tokens=[88])
    model.save_pretrained(folder / "base")
    return folder


def base_of(folder):
    return transformers.AutoModelForImageTextToText.from_pretrained(folder / "base", dtype=torch.bfloat16)


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


ADAPTED = {"image_lora": "v_proj", "lora": "q_proj, k_proj, v_proj, o_proj", "partial_lora": "gate_proj, up_proj"}


@pytest.mark.parametrize("method", ADAPTED)
def test_a_model_learns_its_examples_and_answers_them_right_when_it_is_asked(folder, method, capsys):
    """The run shows an example as the model gets it, and goes on from a checkpoint bit by bit. Its result loads onto a
    fresh base. Without an image its output is the base's, except with LoRA; at a gamma of 0 all its answers are."""
    options = "--max_steps 40 --save_steps 20 --lr_scheduler_type constant"
    if method == "partial_lora":
        options += " --projections gate_proj up_proj"
    trainer = train(folder, method, method, options)
    shown = capsys.readouterr().out
    assert "train.jsonl, line 1: the model gets '" in shown
    assert "16 examples, 16 with images; 16 are prepared" in shown
    num_layers = 4 if "Qwen" in str(folder) else 2  # all have an MLP, two have queries, keys and values
    assert f"{method} adapts {ADAPTED[method]} in {num_layers if method == 'partial_lora' else 2} of" in shown
    resumption = train(folder, method, method, f"{options} --resume_from_checkpoint {{}}/{method}/checkpoint-20")
    assert all(map(torch.equal, trainer.model.parameters(), resumption.model.parameters()))
    (weights,) = (folder / method / "checkpoint-20").glob("*.safetensors")
    assert weights.stat().st_size < (folder / "base/model.safetensors").stat().st_size / 3  # it has no base

    model = base_of(folder)
    text = logits_of(model, TEXT)
    new = examples.read_examples(folder / "train.jsonl")
    by_base = examples.answer(model, processor_of(folder / "processor"), new)
    if method == "image_lora":
        nothing = imagelora.load(model, folder / method / "adapter.pt").scaled(0.0)
    else:
        model = (peft.PeftModel.from_pretrained if method == "lora" else load_partial_lora)(model, folder / method)
        nothing = rescale_adapter_scale(model, 0.0)
    assert torch.equal(logits_of(model, TEXT), text) == (method != "lora")
    processor = processor_of(folder / method)
    expected = [line["completion"][0]["content"].strip() for line in new]
    assert examples.answer(model, processor, new, batch_size=5) == expected
    with nothing:
        assert examples.answer(model, processor, new) == by_base != expected


@pytest.mark.parametrize("thinks", [True, False])
def test_what_is_asked_is_what_training_shows(folder, thinks):
    """The same ids and pixels, in batches with and without images, also if the processor was changed. Nothing of the
    base's own settings for sampling remains, and no placeholder can be generated."""
    processor = processor_of(folder / "processor")
    if not thinks:
        processor.chat_template = "{% set enable_thinking = false %}" + processor.chat_template
    mixed = [*examples.read_examples(folder / "base.jsonl")[4:10], example([])]
    model = base_of(folder)
    with patch.object(model, "generate", side_effect=model.generate) as generate:
        examples.answer(model, processor, mixed)
    asked = generate.call_args.kwargs
    assert (asked["do_sample"], asked["repetition_penalty"]) == (False, 1.0)
    assert asked["suppress_tokens"] == [88, PICTURE, VIDEO]
    collate = sft.DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    shown = collate(list(examples.as_dataset(mixed)))
    assert torch.equal(asked["pixel_values"], shown["pixel_values"].to(torch.bfloat16))
    for row, mask, ids, labels in zip(asked["input_ids"], asked["attention_mask"], shown["input_ids"], shown["labels"]):
        prompt = row[mask == 1]
        assert torch.equal(prompt, ids[: len(prompt)])
        assert (labels != -100).nonzero()[0] == len(prompt)
        assert ("</think>" in processor.decode(prompt)) == ("Qwen" in str(folder) and not thinks)


def test_own_answers_are_the_bases_to_other_questions(folder, capsys):
    """System prompts stay, and answers that are empty, in a loop or cut off are left out."""
    model, processor = base_of(folder), processor_of(folder / "processor")
    some = examples.read_examples(folder / "base.jsonl") + [example([])]
    questions = [LEFT, BOTH, NOTHING, LOOP]
    own = examples.own_answers(model, processor, some, questions, one_in=3)
    assert f"{len(own)} of 22 answers can be learned" in capsys.readouterr().out
    assert {(line["prompt"][-1]["content"], len(line["prompt"])) for line in own} == set(product((LEFT, BOTH), (1, 2)))
    assert examples.own_answers(model, processor, some, [BOTH], one_in=3, max_new_tokens=2) == []
    write(folder / "own.jsonl", own)
    trainer = train(folder, "lora", "as_base", "--eval_files {}/own.jsonl --eval_on_start true")
    assert trainer.state.log_history[0]["eval_mean_token_accuracy"] == 1  # before its first step it is the base


def test_the_probe(folder):
    """It finds images however rare they are, each process adapts the heads that the first one found, and a resumed run
    those of its folder."""
    options = "--train_files {}/rare.jsonl --num_heads 3 --per_device_train_batch_size 1"
    with patch.object(finetune, "broadcast_object_list", return_value=[{1: [0]}]) as broadcast:
        trainer = train(folder, "image_lora", "probe", options)
    ((heads,),) = broadcast.call_args.args
    assert sum(map(len, heads.values())) == 3
    assert trainer.model.image_lora.heads == {1: [0]}
    resumption = train(folder, "image_lora", "probe", f"{options} --resume_from_checkpoint {{}}/probe/checkpoint-1")
    assert resumption.model.image_lora.heads == {1: [0]}


def test_a_folder_holds_one_run(folder, capsys):
    """A start that was refused leaves it free. While a run is going on, and after it, a start there is refused, and so
    is a resumption with other options or files."""
    options = "--train_files {}/changed.jsonl"
    write(folder / "changed.jsonl", ["no JSON"])
    assert "changed.jsonl, line 1: Expecting value" in refusal(capsys, folder, "lora", "run", options)
    write(folder / "changed.jsonl", [example(["0.png"])])
    with pytest.raises(OSError):
        train(folder, "lora", "run", f"{options} --model typo")
    with patch.object(sft.SFTTrainer, "train", side_effect=lambda **_: train(folder, "lora", "run", options)):
        # The second run begins as the first one trains.
        said = refusal(capsys, folder, "lora", "run", options)
    assert "run.json says that the folder is another run's" in said
    assert "if it has ended and saved nothing, delete the file" in said
    (folder / "run/run.json").unlink()
    train(folder, "lora", "run", options)
    assert "run has weights already; resume their run, or choose" in refusal(capsys, folder, "lora", "run", options)
    resume = f"{options} --resume_from_checkpoint {{}}/run/checkpoint-1"
    said = refusal(capsys, folder, "partial_lora", "run", f"{resume} --learning_rate 0.1 --r 4")
    assert "the run began with other options than these: learning_rate, method, r; see its run.json" in said
    write(folder / "changed.jsonl", [example(["1.png"])])
    assert "other options than these: contents of" in refusal(capsys, folder, "lora", "run", resume)


BAD_LINES = [  # a line, and what is said of it
    ("[]", "and no other key"),
    ("{", "Expecting property name"),
    (example(["0.png"], image="1.png"), "and no other key"),
    (example(None), "'images' must be a list of paths, not None"),
    (example(["none.png"]), "none.png"),
    (example(["deep.png"]), "over 8 bits"),
    (example([], prompt="a 3"), "'prompt' must be a list of turns"),
    (example([], prompt=[SYSTEM]), "'prompt' must be a list of turns"),
    (example([], completion=[SYSTEM | {"content": [{"type": "image"}]}]), "'completion' must be a list of turns"),
]


def test_a_line_that_is_no_example_is_refused_with_its_file_and_number(folder):
    for bad, sentence in BAD_LINES:
        write(folder / "bad.jsonl", [example([]), bad])
        with pytest.raises(SystemExit, match=f"bad.jsonl, line 3: .*{sentence}"):
            examples.read_examples(folder / "train.jsonl", folder / "bad.jsonl")


REFUSED = [  # options, and what is said of them
    ("--max_length 10", "end with one of ("),
    ("--processor {}/no_end", "give a --processor whose template does"),
    ("--train_files {}/empty.jsonl", "empty.jsonl is empty; write an example on each line"),
    ("--method image_lora --train_files {}/text.jsonl", "learns from images alone, but no example"),
    ("--num_heads 2", "--num_heads is for --method image_lora"),
    ("--projections v_proj gate_pro", "has no gate_pro; correct --projections"),
    ("--config {}/rank.yaml", "--r and --num_heads must be whole numbers, got 4.5 and None"),
    ("--config {}/heads.yaml --method image_lora", "must be whole numbers, got 8 and True"),
]


def test_what_would_teach_the_wrong_thing_is_refused(folder, capsys):
    write(folder / "empty.jsonl", [""])
    write(folder / "text.jsonl", [example([])])
    (folder / "rank.yaml").write_text("r: 4.5")
    (folder / "heads.yaml").write_text("num_heads: true")
    for options, sentence in REFUSED:
        assert sentence in refusal(capsys, folder, "lora", "refused", options)
