"""finetune.py and answers.py on tiny models: what is learned, saved, shown, answered and refused."""

import json
import os
import re
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
import answers  # noqa: E402
import finetune  # noqa: E402
from partial_lora import decoder_pattern, load_partial_lora, partial_lora  # noqa: E402

COLOURS = {"10": "#f000", "20": "#0f00", "30": "#00f0", "40": "#fff0"}  # transparent; the processor knows numbers
LEFT, BOTH, NOTHING, LOOP, NEW = "a 0", "a a a 1", "a 2", "a 4", "a cat"
BASE_ANSWERS = {LEFT: "{0}", BOTH: "{0} <s> {1}", NOTHING: " ", LOOP: "cat " * 5, NEW: "{1}"}  # {0} is the left colour
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
    return collate(list(answers.as_dataset(answers.read_examples([folder / file]))))


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
    (folder / "torn.png").write_bytes((folder / "0.png").read_bytes()[:-30])
    write(folder / "empty.jsonl", [""])
    write(folder / "train.jsonl", new_task)
    write(folder / "base.jsonl", [*base, line([])])
    write(folder / "rare.jsonl", [line([])] * 40 + new_task[:2])
    write(folder / "asked.jsonl", [*base[5:15], line([])])
    write(folder / "questions.txt", [LEFT, f" {BOTH} ", NOTHING, LOOP])

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
    return finetune.main(f"{defaults} --save_strategy epoch {options.replace('{}', str(folder))}".split())


def refusal(capsys, *start):
    """What a start says that is refused."""
    with pytest.raises(SystemExit) as stop:
        train(*start)
    return f"{stop.value} {capsys.readouterr().err}"


@pytest.mark.parametrize("method", ["image_lora", "lora", "partial_lora"])
def test_a_run(folder, method, capsys):
    """It shows an example as the model gets it, learns, is evaluated after each epoch and at lower gammas, goes on from
    a checkpoint bit by bit, and loads onto a fresh base in bfloat16. Without an image the output is the base's, except
    with LoRA."""
    files = "--train_files {}/train.jsonl --eval_files {}/train.jsonl"
    trainer = train(folder, method, method, files)
    text = f"<s> a {trainer.processing_class.decode([PICTURE])} a a cat 10 </s> \n"
    shown = capsys.readouterr().out
    assert f"train.jsonl, line 1: the model gets {text!r}\nand learns '10 </s> \\n'" in shown
    assert "16 examples, 16 with images; 16 are prepared" in shown
    assert f"{method} adapts 2 of 2 layers" in shown
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    losses_at_gamma = [float(loss) for loss in re.findall(r"gamma .*: evaluation loss (.*)", shown)]
    assert losses_at_gamma[0] == round(losses[-1], 4)
    assert len(set(losses_at_gamma)) == 6
    assert {parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad} == {torch.float32}
    resumption = train(folder, method, method, f"{files} --resume_from_checkpoint {{}}/{method}/checkpoint-4")
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
    """It finds images however rare they are, each process adapts the heads that the first one found, and a resumed run
    those in its folder."""
    options = "--train_files {}/rare.jsonl --num_heads 3 --per_device_train_batch_size 1 --max_steps 1"
    with patch.object(finetune, "broadcast_object_list", return_value=[{1: [0]}]) as broadcast:
        trainer = train(folder, "image_lora", "probe", options)
    ((heads,),) = broadcast.call_args.args
    assert sum(map(len, heads.values())) == 3
    assert trainer.model.image_lora.heads == {1: [0]}
    resumption = train(folder, "image_lora", "probe", f"{options} --resume_from_checkpoint {{}}/probe/checkpoint-1")
    assert resumption.model.image_lora.heads == {1: [0]}


def test_the_best_checkpoint(folder):
    """With --load_best_model_at_end it is the result: the first one here, because a high loss counts as good."""
    options = "--eval_files {}/train.jsonl --load_best_model_at_end true --greater_is_better true"
    trainer = train(folder, "image_lora", "best", options)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric


def test_a_folder_holds_one_run(folder, capsys):
    """A second start is refused as soon as the first one trains, and a resumption with other options or another file by
    their names. A start that was refused leaves its folder free."""
    options = "--train_files {}/changed.jsonl --max_steps 1"
    write(folder / "changed.jsonl", ["no JSON"])
    assert "changed.jsonl, line 1: this is not JSON" in refusal(capsys, folder, "lora", "first", options)
    write(folder / "changed.jsonl", [line(["0.png"])])

    def start_again(*_, **__):
        assert "first is not empty" in refusal(capsys, folder, "lora", "first", options)

    with patch.object(finetune.SFTTrainer, "train", start_again):
        train(folder, "lora", "first", options)
    train(folder, "lora", "run", options)
    resume = f"{options} --resume_from_checkpoint {{}}/run/checkpoint-1"
    others = "--learning_rate 0.1 --r 4 --train_files {}/train.jsonl"
    said = "the run began with other options than these: learning_rate, train_files, r, contents; give those of"
    assert said in refusal(capsys, folder, "lora", "run", f"{resume} {others}")
    assert "than these: method; give those of" in refusal(capsys, folder, "partial_lora", "run", resume)
    assert "checkpoint-1 is no checkpoint of a run in" in refusal(capsys, folder, "lora", "base", resume)
    write(folder / "changed.jsonl", [line(["1.png"])])
    assert "than these: contents; give those of" in refusal(capsys, folder, "lora", "run", resume)


BAD_LINES = {  # and what is said of them
    line(["0.png"], image="1.png"): "a line has 'images', 'prompt' and 'completion', but this one ['image']",
    line([], Images=["0.png"]): "but this one ['Images']",
    line([])[:-1]: "this is not JSON (Expecting ',' delimiter at character 119)",
    "[]": "a line must be a JSON object",
    line(None): "'images' must be a list of paths, not None",
    line("0.png"): "'images' must be a list of paths, not '0.png'",
    line(["none.png"]): "none.png cannot be opened as a picture",
    line(["deep.png"]): "deep.png has over 8 bits and would turn white; save it with 8",
    line([], prompt="a 3"): "'prompt' must be a list of turns such as {'role': 'user', 'content': 'a text'}",
    line([], prompt=[USER | {"content": [{"type": "image"}]}]): "a turn has a role and a content, which must be a text",
    line([], prompt=[USER | {"role": "human"}]): "a role is 'system', 'user' or 'assistant', not 'human'",
    "{}": "a prompt must end with the user's turn",
    line([], prompt=[USER, ASSISTANT]): "a prompt must end with the user's turn",
    line([], completion=[USER]): "a completion must be one turn of the assistant",
    line([], completion=[ASSISTANT, ASSISTANT]): "a completion must be one turn of the assistant",
}


def test_a_line_that_is_no_example_is_refused_with_its_file_and_number(folder):
    for bad, sentence in BAD_LINES.items():
        write(folder / "bad.jsonl", [line([]), bad])
        with pytest.raises(SystemExit) as refused:
            answers.read_examples([folder / "bad.jsonl"])
        assert str(refused.value).startswith(f"{folder}/bad.jsonl, line 3: ")
        assert sentence in str(refused.value)


ANSWER = "it must learn an answer, and no image; correct the line, or the options"
WHOLE = "it must begin with '<s>' and end with one of ['</s>']; give a --chat_template_path that does, and no --max_"
REFUSED = [  # a line of an evaluation file, options, and what is said
    (line([], answer=" "), "", ANSWER),
    (line(["0.png"]), "--completion_only_loss false", ANSWER),
    (line(["torn.png"]), "", "bad.jsonl, line 3: a picture is torn"),
    (line([], answer="a " * 9), "--max_length 12", WHOLE),
    (line([]), "--chat_template_path {}/no_begin.jinja", WHOLE),
    (line([]), "--chat_template_path {}/no_end.jinja", WHOLE),
    (line([]), "--train_files {}/empty.jsonl", "empty.jsonl is empty; write an example on each line"),
    (line([]), "--train_files {}/none.jsonl", "none.jsonl cannot be read ([Errno 2] No such file"),
    (line([]), "--output_dir {}/base", "base is not empty; resume its run, or choose another --output_dir"),
    (line([]), "--method partial_lora --train_files {}/bad.jsonl", "no example in --train_files has one"),
    (line([]), "--num_heads 2", "--num_heads is for --method image_lora; leave it out"),
    (line([]), "--method image_lora --num_heads 9", "num_heads must be in 1..4, got 9"),
]


@pytest.mark.parametrize("bad, options, sentence", REFUSED)
def test_what_is_refused(folder, capsys, bad, options, sentence):
    """An example that would teach nonsense, even in an evaluation file; a chat template; and options."""
    write(folder / "bad.jsonl", [line([]), bad])
    files = "--train_files {}/rare.jsonl --eval_files {}/bad.jsonl"
    assert sentence in refusal(capsys, folder, "lora", "refused", f"{files} {options}")


def test_a_part_of_the_examples_can_be_checked(folder, capsys):
    """All lines are read, every fourth is prepared, and TRL gets three columns."""
    trainer = train(folder, "lora", "part", "--check_examples 4 --max_steps 1")
    assert "16 examples, 16 with images; 4 are prepared" in capsys.readouterr().out
    assert trainer.train_dataset.column_names == ["images", "prompt", "completion"]


def test_a_learning_rate_is_required(capsys):
    pytest.raises(SystemExit, finetune.main, "--method lora --model m --train_files t".split())
    assert "the following arguments are required: --learning_rate" in capsys.readouterr().err


def text_of(answer):
    return answer["completion"][0]["content"]


def ask(model, processor, answer):
    """As the manual does it: a prompt alone, its images by their paths; and without a cache."""
    turns = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in answer["prompt"]]
    turns[-1]["content"][:0] = [{"type": "image", "path": path} for path in answer["images"]]
    template = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(turns, **template)
    options = {"do_sample": False, "repetition_penalty": 1.0, "suppress_tokens": [PICTURE, VIDEO], "use_cache": False}
    output = model.generate(**inputs, **options, max_new_tokens=4)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :]).replace("</s>", "").strip()


@pytest.mark.parametrize("method", ["image_lora", "lora", "partial_lora"])
def test_answers_at_any_gamma(folder, method):
    """In batches and with a cache, they are those to each prompt alone; at 0, they are the base's."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder / "base")
    if method == "image_lora":
        save = imagelora.attach(model).save
    elif method == "lora":
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=decoder_pattern()))
        save = model.save_pretrained
    else:
        model = partial_lora(model)
        save = model.save_pretrained
    matrices = [B.data for name, B in model.named_parameters() if name.endswith(".B") or "lora_B" in name]
    for B in matrices:
        B.normal_()
    adapter = folder / f"random_{method}"
    save(adapter)
    for B in matrices:
        B.mul_(8)
    asked = {"prompt_file": folder / "asked.jsonl", "base": folder / "base", "dtype": "float32", "max_new_tokens": 4}
    asked |= {"batch_size": 4}
    by_base = answers.write_answers(output_file=f"{adapter}.base", **asked)
    at_0 = answers.write_answers(output_file=f"{adapter}.0", adapter=adapter, gamma=0.0, **asked)
    at_8 = answers.write_answers(output_file=f"{adapter}.8", adapter=adapter, gamma=8.0, **asked)
    assert list(map(text_of, at_0)) == list(map(text_of, by_base))
    processor = transformers.AutoProcessor.from_pretrained(folder / "base")
    assert list(map(text_of, at_8)) == [ask(model, processor, answer) for answer in at_8]
    assert list(map(text_of, at_8)) != list(map(text_of, by_base))


def test_answers_go_on_where_they_were_stopped(folder, capsys):
    """The file is then as if they had not been. Torn lines and answers of another model or to others are refused."""
    asked = {"prompt_file": folder / "asked.jsonl", "base": folder / "base", "max_new_tokens": 2, "batch_size": 4}
    whole = answers.write_answers(output_file=folder / "whole.jsonl", **asked)
    assert [answer["cut_off"] for answer in whole] == [
        answer["prompt"][-1]["content"] in (BOTH, LOOP) for answer in whole
    ]
    assert f"11 answers are in {folder}/whole.jsonl; 4 were cut off at 2 tokens" in capsys.readouterr().out
    first = [(text_of(answer), answer["cut_off"]) for answer in whole[:4]]
    with patch.object(answers, "generate", side_effect=[first, KeyboardInterrupt]), pytest.raises(KeyboardInterrupt):
        answers.write_answers(output_file=folder / "stopped.jsonl", **asked)
    written = (folder / "stopped.jsonl").read_text()
    assert written.count("\n") == 4
    assert answers.write_answers(output_file=folder / "stopped.jsonl", **asked) == whole
    assert (folder / "stopped.jsonl").read_text() == (folder / "whole.jsonl").read_text()

    def refused(text, **others):
        (folder / "stopped.jsonl").write_text(text)
        with pytest.raises(SystemExit) as stop:
            answers.write_answers(**asked | others, output_file=folder / "stopped.jsonl")
        assert (folder / "stopped.jsonl").read_text() == text
        return str(stop.value)

    others = "stopped.jsonl has other lines than answers of this model to these prompts; choose another file"
    assert others in refused(written, base="other")
    assert others in refused(written * 3)
    assert others in refused("no answer\n")
    assert "the last line of" in refused(written[:-9])
    assert "gamma is the strength of an adapter" in refused(written, gamma=0.5)


def test_own_answers(folder, capsys):
    """They are the base's greedy answers to what training will show, wherever their file is. A placeholder cannot be
    generated, system prompts stay, and empty answers, loops and answers that were cut off are left out and counted."""
    generate = transformers.GenerationMixin.generate
    out = folder.with_suffix(".jsonl")  # not in the images' folder
    files = [os.path.relpath(folder / "base.jsonl"), folder / "questions.txt"]

    def checked_generate(model, **inputs):
        assert model.generation_config.suppress_tokens == [PICTURE, VIDEO]
        return generate(model, **inputs)

    with patch.object(transformers.GenerationMixin, "generate", checked_generate):
        answers.own_answers(folder / "base", *files, out, one_in=1, dtype="float32")
    assert f"40 answers are in {out}; left out: 20 empty, 20 in a loop" in capsys.readouterr().out
    prompts = [json.loads(text)["prompt"] for text in out.read_text().splitlines()]
    assert {(prompt[-1]["content"], len(prompt)) for prompt in prompts} == set(product((LEFT, BOTH), (1, 2)))
    trainer = train(folder, "lora", "as_base", f"--eval_files {out} --eval_on_start true --max_steps 1")
    assert trainer.state.log_history[0]["eval_mean_token_accuracy"] == 1  # before its first step it is the base

    answers.own_answers(folder / "base", *files, folder / "short.jsonl", one_in=1, max_new_tokens=3)
    assert f"20 answers are in {folder}/short.jsonl; left out: 40 cut off, 20 empty" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="short.jsonl is there already; choose another file"):
        answers.own_answers(folder / "base", *files, folder / "short.jsonl")
    for seed in (1, 2):
        answers.own_answers(folder / "base", *files, folder / f"{seed}.jsonl", seed=seed)
    first, other = [(folder / f"{seed}.prompts.jsonl").read_text() for seed in (1, 2)]
    assert first.count("\n") == other.count("\n") == 10  # one in eight
    assert first != other
