"""finetune.py on tiny models: what it learns, saves, shows and refuses, and whose answers own_answers() writes."""

import json
import os
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
sft = pytest.importorskip("trl.trainer.sft_trainer")
tokenizers = pytest.importorskip("tokenizers")
import finetune  # noqa: E402
from partial_lora import load_partial_lora  # noqa: E402

COLOURS = {"10": "#f000", "20": "#0f00", "30": "#00f0", "40": "#fff0"}  # transparent; the processor knows numbers
LEFT, BOTH, NOTHING, NEW = "a 0", "a a a 1", "a 2", "a cat"
BASE_ANSWERS = {LEFT: "{0}", BOTH: "{0} <s> {1}", NOTHING: " ", NEW: "{1}"}  # {0} is the left colour
SYSTEM, USER, ASSISTANT = ({"role": role, "content": "a 3"} for role in ("system", "user", "assistant"))


def line(images, question=NEW, answer="a", system=(), **changes):
    prompt = [*system, {"role": "user", "content": question}]
    completion = [{"role": "assistant", "content": answer}]
    return json.dumps({"images": images, "prompt": prompt, "completion": completion} | changes)


def write(file, lines):
    """As an editor of Windows may write it: with a byte-order mark, CRLF and empty lines."""
    file.write_bytes(("\ufeff" + "\r\n\r\n".join(lines) + "\r\n").encode())


def batch_of(folder, file):
    """A file as training shows it to the model."""
    processor = transformers.AutoProcessor.from_pretrained(folder / "base")
    collate = sft.DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    return collate(list(finetune.read_examples([folder / file])))


@pytest.fixture(scope="module", params=["Llava", "Qwen2_5_VL"])
def folder(request, tmp_path_factory):
    """A base that has learned BASE_ANSWERS, photos that are turned by a quarter, and files."""
    folder = tmp_path_factory.mktemp(request.param)
    new_task, base = [], []
    exif = Image.Exif()
    exif[0x0112] = 6
    for i, (left, right) in enumerate(product(COLOURS, COLOURS)):
        image = Image.new("RGBA", (16, 16), COLOURS[left])
        image.paste(COLOURS[right], (8, 0, 16, 16))
        image.transpose(Image.Transpose.ROTATE_90).save(folder / f"{i}.png", exif=exif)
        new_task.append(line([f"{i}.png"], NEW, left))  # not what the base answers
        for question, answer in BASE_ANSWERS.items():
            base.append(line([f"{i}.png"], question, answer.format(left, right), [SYSTEM] * (i % 2)))
    Image.new("I;16", (8, 8)).save(folder / "deep.png")
    write(folder / "train.jsonl", new_task)
    write(folder / "base.jsonl", [*base, line([])])
    write(folder / "rare.jsonl", [line([])] * 40 + new_task[:2])
    write(folder / "questions.txt", [LEFT, f" {BOTH} ", NOTHING])

    processor = processor_for(request.param)
    processor.tokenizer.bos_token = "<s>"
    processor.tokenizer.add_tokens("\n", special_tokens=True)
    processor.chat_template = processor.chat_template.replace("</s>", "</s>\n")  # as Qwen2.5-VL's
    processing = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    processor.tokenizer.backend_tokenizer.post_processor = processing
    (folder / "no_begin.jinja").write_text(processor.chat_template)
    processor.chat_template = "<s> " + processor.chat_template
    (folder / "no_end.jinja").write_text(processor.chat_template.replace("</s>", ""))
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


def train(folder, method, out, options=""):
    """The trainer after four epochs of two steps. The options may override these."""
    defaults = f"--method {method} --model {folder}/base --train_files {folder}/train.jsonl --output_dir {folder}/{out}"
    defaults += " --use_cpu true --learning_rate 0.02 --per_device_train_batch_size 8 --num_train_epochs 4"
    return finetune.main(f"{defaults} --save_strategy epoch {options.format(folder)}".split())


def answer_questions(folder, out, **options):
    image_file = os.path.relpath(folder / "base.jsonl")
    finetune.own_answers(folder / "base", image_file, folder / "questions.txt", out, **options)
    return [json.loads(text) for text in out.read_text().splitlines()]


@pytest.mark.parametrize("method", ["image_lora", "lora", "partial_lora"])
def test_a_run(folder, method, capsys):
    """It shows an example as the model gets it, learns, is evaluated after each epoch, goes on from a checkpoint bit by
    bit, and loads onto a fresh base in bfloat16. Without an image the output is the base's, except with LoRA."""
    trainer = train(folder, method, method, "--eval_files {}/train.jsonl")
    text = f"<s> a {trainer.processing_class.decode([PICTURE])} a a cat 10 </s> \n"
    assert f"train.jsonl, line 1: the model gets {text!r}\nand learns '10 </s> \\n'" in capsys.readouterr().out
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert {parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad} == {torch.float32}
    resumption = train(folder, method, method, f"--resume_from_checkpoint {{}}/{method}/checkpoint-4")
    assert all(map(torch.equal, trainer.model.parameters(), resumption.model.parameters()))
    assert resumption.state.log_history[0] == trainer.state.log_history[0]  # it did not begin anew
    (weights,) = (folder / method / "checkpoint-4").glob("*.safetensors")
    assert weights.stat().st_size < (folder / "base/model.safetensors").stat().st_size / 3  # it has no base

    model = transformers.AutoModelForImageTextToText.from_pretrained(folder / "base", dtype=torch.bfloat16)
    text = logits_of(model, TEXT)
    if method == "image_lora":
        alpha = imagelora.load(model, folder / method / "adapter.pt").lora_alpha
    else:
        model = (peft.PeftModel.from_pretrained if method == "lora" else load_partial_lora)(model, folder / method)
        assert len(peft.get_peft_model_state_dict(model)) == 16  # A and B of q, k, v and o in two layers
        alpha = model.peft_config["default"].lora_alpha
    assert alpha == 16
    assert torch.equal(logits_of(model, TEXT), text) == (method != "lora")
    batch = batch_of(folder, "base.jsonl")
    assert torch.equal(logits_of(model, batch), logits_of(trainer.model.eval(), batch))


def test_the_probe(folder):
    """It finds images however rare they are, and each process adapts the heads that the first one found."""
    options = "--train_files {}/rare.jsonl --num_heads 3 --per_device_train_batch_size 1 --max_steps 1"
    with patch.object(finetune, "broadcast_object_list", return_value=[{1: [0]}]) as broadcast:
        trainer = train(folder, "image_lora", "probe", options)
    ((heads,),) = broadcast.call_args.args
    assert sum(map(len, heads.values())) == 3
    assert trainer.model.image_lora.heads == {1: [0]}


def test_the_best_checkpoint(folder):
    """With --load_best_model_at_end it is the result: the first one here, because a high loss counts as good."""
    options = "--eval_files {}/train.jsonl --load_best_model_at_end true --greater_is_better true"
    trainer = train(folder, "image_lora", "best", options)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric


TURNS = "bad.jsonl, line 3: its prompt must end with the user's turn, and its completion be one turn of the assistant"
ANSWER = "it must learn an answer, and no image; correct the line, or the options"
WHOLE = "it must begin with '<s>' and end with one of ['</s>']; give a --chat_template_path that does, and no --max_"
REFUSED = [  # a line of a file, options, and what is said
    (line([], answer=" "), "", ANSWER),
    ("{}", "", TURNS),
    (line(["0.png"]), "--completion_only_loss false", ANSWER),
    (line([], prompt=[USER | {"content": [{"type": "image"}]}]), "", "bad.jsonl, line 3: a turn's content must be a"),
    (line([]), "--resume_from_checkpoint {}", "is not of --method lora; resume a checkpoint that is"),
    (line([], completion=[USER]), "", TURNS),
    (line([], completion=[ASSISTANT, ASSISTANT]), "", TURNS),
    (line([], prompt=[USER, ASSISTANT]), "", TURNS),
    (line([], answer="a " * 9), "--max_length 12", WHOLE),
    (line(["deep.png"]), "", "bad.jsonl, line 3: an image of over 8 bits would turn white; save it with 8"),
    (line([]), "--chat_template_path {}/no_begin.jinja", WHOLE),
    (line([]), "--chat_template_path {}/no_end.jinja", WHOLE),
    (line([]), "--output_dir {}/base", "base holds an earlier run; choose another --output_dir, or resume that run"),
    (line([]), "--method partial_lora --train_files {}/bad.jsonl", "no example in --train_files has one"),
    (line([]), "--num_heads 2", "--num_heads is for --method image_lora; leave it out"),
]


@pytest.mark.parametrize("bad, options, sentence", REFUSED)
def test_what_is_refused(folder, capsys, bad, options, sentence):
    """A line that would teach nonsense, even in an evaluation file; a chat template; and options."""
    write(folder / "bad.jsonl", [line([]), bad])
    files = f"--train_files {folder}/rare.jsonl --eval_files {folder}/bad.jsonl"
    with pytest.raises(SystemExit) as refusal:
        train(folder, "lora", "refused", f"{files} {options}")
    assert sentence in f"{refusal.value} {capsys.readouterr().err}"


def test_a_learning_rate_is_required(capsys):
    pytest.raises(SystemExit, finetune.main, "--method lora --model m --train_files t".split())
    assert "the following arguments are required: --learning_rate" in capsys.readouterr().err


def test_own_answers(folder):
    """They are the base's greedy answers to what training will show, wherever their file is. A placeholder cannot be
    generated, system prompts stay, empty answers are left out, and each line is written at once."""
    generate = transformers.GenerationMixin.generate
    counts = []
    out = folder.with_suffix(".jsonl")  # not in the images' folder

    def counting_generate(model, **inputs):
        assert model.generation_config.suppress_tokens == [PICTURE, VIDEO]
        counts.append(out.read_text().count("\n"))
        return generate(model, **inputs)

    with patch.object(transformers.GenerationMixin, "generate", counting_generate):
        examples = answer_questions(folder, out, one_in=1)
    questions = {(example["prompt"][-1]["content"], len(example["prompt"])) for example in examples}
    assert questions == set(product((LEFT, BOTH), (1, 2)))
    assert counts == [i - i // 3 for i in range(64)]
    trainer = train(folder, "lora", "as_base", f"--eval_files {out} --eval_on_start true --max_steps 1")
    assert trainer.state.log_history[0]["eval_mean_token_accuracy"] == 1  # before its first step it is the base


def test_a_share_of_own_answers(folder, capsys):
    """One image in eight is asked about, chosen by the seed. Answers that are cut off are left out and counted, and no
    file is overwritten."""
    first, other = (answer_questions(folder, folder / f"{seed}.jsonl", seed=seed) for seed in (1, 2))
    assert len(first) == len(other) == 6  # and two empty ones
    assert first != other
    short = answer_questions(folder, folder / "short.jsonl", one_in=1, max_new_tokens=3)
    assert {example["prompt"][-1]["content"] for example in short} == {LEFT}
    assert "22 of 64 answers" in capsys.readouterr().out
    pytest.raises(FileExistsError, answer_questions, folder, folder / "short.jsonl")
