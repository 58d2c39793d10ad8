"""finetune.py on tiny random models: what it learns, what it saves, how it goes on, and what it refuses."""

import json
import shutil

import pytest
import torch
from PIL import Image
from test_huggingface import TEXT, processor_for, tiny_hf_vlm

import imagelora
from test_imagelora import logits_of

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("trl")
tokenizers = pytest.importorskip("tokenizers")
safetensors = pytest.importorskip("safetensors.torch")
from data.huggingface import finetune  # noqa: E402
from data.huggingface.partial_lora import load_partial_lora  # noqa: E402


def turn(role, content):
    return {"role": role, "content": content}


def line(images, answer="cat", **changes):
    """A line of a file: a question, its answer, and what is to be otherwise."""
    example = {"images": images, "prompt": [turn("user", "a cat")], "completion": [turn("assistant", answer)]}
    return json.dumps(example | changes)


@pytest.fixture(scope="module", params=["Llava", "Qwen2_5_VL"])
def folder(request, tmp_path_factory):
    """A base, images, and files. In train.jsonl, examples have one image, two, or none."""
    folder = tmp_path_factory.mktemp(request.param)
    processor_for(request.param).save_pretrained(folder / "base")
    tiny_hf_vlm(request.param).save_pretrained(folder / "base")
    for name, pixels in zip(("a.png", "b.png"), torch.randint(256, (2, 12, 9, 3), dtype=torch.uint8)):
        Image.fromarray(pixels.numpy()).save(folder / name)
    Image.new("I;16", (8, 8)).save(folder / "deep.png")
    lines = [line(["a.png"], "7"), line(["a.png", "b.png"], "cat 3"), line(["b.png"]), "", line([], "a")]
    (folder / "train.jsonl").write_text("\n".join(lines))
    (folder / "rare.jsonl").write_text("\n".join([line([])] * 40 + [line(["a.png"])]))
    (folder / "text.jsonl").write_text(line([]))
    (folder / "empty.jsonl").touch()
    return folder


def finetuned(folder, method, out, options=""):
    """The trainer after six steps with two checkpoints. The options may override these."""
    defaults = f"--method {method} --model {folder}/base --train_file {folder}/train.jsonl --output_dir {folder}/{out}"
    defaults += " --use_cpu true --learning_rate 0.02 --per_device_train_batch_size 2 --save_steps 3 --logging_steps 3"
    return finetune.main(f"{defaults} {options.format(folder)}".split())


def adapter_of(run):
    (file,) = [path for path in run.iterdir() if path.name in ("adapter.pt", "adapter_model.safetensors")]
    return file.read_bytes()


@pytest.fixture(scope="module", params=["image_lora", "lora", "partial_lora"])
def run(request, folder):
    return folder, request.param, finetuned(folder, request.param, request.param)


def test_it_learns_and_goes_on_from_a_checkpoint_as_if_it_had_never_stopped(run):
    folder, method, trainer = run
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    shutil.copytree(folder / method / "checkpoint-3", folder / f"stopped_{method}")
    finetuned(folder, method, f"again_{method}", f"--resume_from_checkpoint {{}}/stopped_{method}")
    assert adapter_of(folder / f"again_{method}") == adapter_of(folder / method)


def test_the_result_loads_on_a_fresh_base_and_text_stays_the_bases_except_with_lora(run):
    folder, method, trainer = run
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder / "base", dtype=torch.bfloat16)
    text = logits_of(model, TEXT)
    if method == "image_lora":
        imagelora.load(model, folder / method / "adapter.pt")
    elif method == "lora":
        model = peft.PeftModel.from_pretrained(model, folder / method)
    else:
        model = load_partial_lora(model, folder / method)
    assert torch.equal(logits_of(model, TEXT), text) == (method != "lora")
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    assert torch.equal(logits_of(model, batch), logits_of(trainer.model.eval(), batch))


def test_the_probe_finds_the_examples_with_images_however_rare_they_are(folder, capsys):
    finetuned(folder, "image_lora", "heads", "--num_heads 3 --train_file {}/rare.jsonl")
    heads = torch.load(folder / "heads" / "adapter.pt")["kv_indices"]
    assert sum(map(len, heads.values())) == 3
    assert "3 heads, the best of 4 by the probe: {0: [" in capsys.readouterr().out


def test_the_best_checkpoint_becomes_the_result(folder):
    """A high loss counts as good here, so that the best one is the first."""
    options = "--eval_file {}/train.jsonl --eval_strategy steps --eval_steps 3 --load_best_model_at_end true"
    finetuned(folder, "image_lora", "best", f"{options} --greater_is_better true")
    result = torch.load(folder / "best" / "adapter.pt")["layers"]["0"]["B"]
    first, last = (folder / "best" / f"checkpoint-{step}" / "model.safetensors" for step in (3, 6))
    assert torch.equal(result, safetensors.load_file(first)["image_lora.layers.0.B"])
    assert not torch.equal(result, safetensors.load_file(last)["image_lora.layers.0.B"])


def test_labels_are_the_completion_alone_also_if_it_is_json(folder):
    """They hold no placeholder, no padding and no earlier answer."""
    answers = ["null", "7", "true", '"cat"', "[412, 88]"]
    earlier = [turn("user", "a cat"), turn("assistant", "[412, 88]"), turn("user", "3")]
    lines = [line(["a.png"], answer) for answer in answers] + [line(["a.png"], "7", prompt=earlier)]
    (folder / "answers.jsonl").write_text("\n".join(lines))
    trainer = finetuned(folder, "image_lora", "labels", "--train_file {}/answers.jsonl --max_steps 1")
    batch = trainer.data_collator(list(trainer.train_dataset))
    decode = trainer.processing_class.tokenizer.decode
    learned = [decode(labels[labels != -100]) for labels in batch["labels"]]
    assert learned == [f"{answer} </s>" for answer in [*answers, "7"]]
    assert "a cat [412, 88] </s> 3" in decode(batch["input_ids"][-1])


@pytest.mark.parametrize("start", ["", "<s>"])
def test_a_bos_token_of_the_tokenizer_begins_an_example_once_whether_the_template_has_it_or_not(tmp_path, start):
    processor = processor_for("Llava")
    processor.tokenizer.bos_token = "<s>"
    processing = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    processor.tokenizer.backend_tokenizer.post_processor = processing
    processor.chat_template = start + processor.chat_template
    processor.save_pretrained(tmp_path)
    collate = finetune.DataCollatorForVisionLanguageModeling(finetune.load_processor(tmp_path))
    (ids,) = collate([json.loads(line([])) | {"images": [Image.new("RGB", (8, 8))]}])["input_ids"]
    assert (ids == 1).nonzero().tolist() == [[0]]


BAD_LINES = {
    "{'images'": "JSONDecodeError",
    line([], tools=[]): "a line needs images, prompt and completion, and nothing else",
    line([], prompt=[turn("assistant", "a")]): "the prompt must end with a turn of the user",
    line([], completion=[turn("user", "a"), turn("assistant", "a")]): "the completion is one turn of the assistant",
    line([], prompt=[turn("user", [{"type": "text", "text": "a"}])]): "the content of a turn must be a string",
    line([], " "): "that of the completion must not be empty",
    line(["deep.png"]): "has more than 8 bits a channel; save it with 8",
    line([], prompt=[turn("user", "<image><|image_pad|>")]): "leave it out, because it is added for each image",
}
BAD_OPTIONS = [
    ("image_lora", "--train_file {}/text.jsonl", "text.jsonl has an image, as image_lora needs"),
    ("image_lora", "--eval_file {}/text.jsonl", "text.jsonl has an image, as image_lora needs"),
    ("lora", "--train_file {}/empty.jsonl", "empty.jsonl holds no example"),
    ("lora", "--num_heads 2", "--num_heads is for --method image_lora; leave it out"),
]


def refusal(capsys, *command):
    """The one line that a refused command prints."""
    with pytest.raises(SystemExit):
        finetuned(*command)
    return capsys.readouterr().err.splitlines()[-1]


def test_a_bad_line_is_named(folder, capsys):
    for bad, sentence in BAD_LINES.items():
        (folder / "bad.jsonl").write_text(f"{line(['a.png'])}\n{bad}\n")
        refused = refusal(capsys, folder, "image_lora", "bad", "--eval_file {}/bad.jsonl")
        assert f"{folder}/bad.jsonl, line 2: " in refused
        assert sentence in refused


def test_a_file_without_images_and_other_bad_options_are_refused(folder, capsys):
    for method, options, sentence in BAD_OPTIONS:
        assert sentence in refusal(capsys, folder, method, "bad", options)
