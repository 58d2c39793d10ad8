"""tune.py on tiny random models: three methods on two families, how a run goes on, and what is refused."""

import json
import subprocess
import sys
from itertools import product

import pytest
import torch
from PIL import Image

import imagelora
from data.test_huggingface import PICTURE, TEXT, TWO_FAMILIES, hf_prompt, processor_for, tiny_hf_vlm
from test_imagelora import logits_of

transformers = pytest.importorskip("transformers", minversion="5")
peft, _, _ = map(pytest.importorskip, ("peft", "trl", "datasets"))
from data import tune  # noqa: E402

METHODS = ["image_lora", "lora", "lora_at_visual_tokens"]
RUNS = list(product(["Llava", "Qwen2_5_VL"], METHODS))
OPTIONS = "--learning_rate 0.02 --num_train_epochs 3 --per_device_train_batch_size 1 --gradient_accumulation_steps 2"
PARTS = [{"type": "image"}, {"type": "text", "text": "a cat"}]  # where an image stands; or else images come first
OPTIONS += " --logging_steps 4 --save_steps 6 --use_cpu true --disable_tqdm true"


def line(images, completion="cat", prompt="a cat", role="user"):
    prompt, completion = {"role": role, "content": prompt}, {"role": "assistant", "content": completion}
    return json.dumps({"images": images, "prompt": [prompt], "completion": [completion]})


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """For each family a folder with a base, images, and eight lines with one image, with two, or with none."""
    folders = {}
    lines = [line(["a.png"], "7"), line(["a.png", "b.png"], "cat 3"), line(["b.png"], prompt=PARTS), line([], "a")]
    for family in ("Llava", "Qwen2_5_VL"):
        folder = folders[family] = tmp_path_factory.mktemp(family)
        processor_for(family).save_pretrained(folder / "base")
        tiny_hf_vlm(family).save_pretrained(folder / "base")
        for name, pixels in zip(("a.png", "b.png"), torch.randint(256, (2, 12, 9, 3), dtype=torch.uint8)):
            Image.fromarray(pixels.numpy()).save(folder / name)
        (folder / "truncated.png").write_bytes((folder / "a.png").read_bytes()[:200])
        (folder / "train.jsonl").write_text("\n".join(lines * 2))
    return folders


def tuned(folder, method, out, *more):
    files = f"--model {folder}/base --train_file {folder}/train.jsonl --output_dir {folder}/{out}"
    return tune.main([*f"{files} --method {method} {OPTIONS}".split(), *more])


@pytest.fixture(scope="session", params=RUNS, ids=" ".join)
def run(request, folders):
    """A family's folder, a method, and its trainer after training."""
    family, method = request.param
    return folders[family], method, tuned(folders[family], method, f"{method}/one")


def weights(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def test_it_learns_and_goes_on_from_a_checkpoint_as_if_it_had_never_stopped(run):
    folder, method, trainer = run
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    checkpoint = folder / method / "one" / "checkpoint-6"
    again = tuned(folder, method, f"{method}/again", "--resume_from_checkpoint", str(checkpoint))
    torch.testing.assert_close(weights(again.model), weights(trainer.model), rtol=0, atol=0)


@pytest.mark.parametrize("saved", [".", "checkpoint-12"])
def test_results_and_checkpoints_load_on_a_fresh_base_and_text_alone_stays_the_bases_bit_for_bit(run, saved):
    """Plain LoRA changes it."""
    folder, method, trainer = run
    saved = folder / method / "one" / saved
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder / "base", dtype=torch.bfloat16)
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    text = logits_of(model, TEXT)
    if method == "image_lora":
        imagelora.load(model, saved / "adapter.pt")
        with pytest.raises(ValueError, match="Unrecognized model"):  # it would have random weights
            transformers.AutoModelForImageTextToText.from_pretrained(saved)
    elif method == "lora":
        model = peft.PeftModel.from_pretrained(model, saved)
    else:
        model = tune.load_at_visual_tokens(model, saved)
    assert torch.equal(logits_of(model, TEXT), text) == (method != "lora")
    assert torch.equal(logits_of(model, batch), logits_of(trainer.model.eval(), batch))
    assert type(transformers.AutoProcessor.from_pretrained(saved)) is type(trainer.processing_class)


def test_the_best_heads_are_chosen_printed_kept_in_the_file_and_kept_when_a_run_goes_on(folders, capsys):
    folder = folders["Llava"]
    trainer = tuned(folder, "image_lora", "heads", "--num_heads", "3", "--save_steps", "1")
    heads = torch.load(folder / "heads" / "adapter.pt")["kv_indices"]
    assert sum(map(len, heads.values())) == 3
    assert f"3 of 4 value heads, by the exact probe: {trainer.model.image_lora.heads}" in capsys.readouterr().out
    checkpoint = str(folder / "heads" / "checkpoint-1")
    again = tuned(folder, "image_lora", "heads-again", "--num_heads", "3", "--resume_from_checkpoint", checkpoint)
    torch.testing.assert_close(weights(again.model), weights(trainer.model), rtol=0, atol=0)


# LoRA at visual tokens
@TWO_FAMILIES
def test_lora_at_visual_tokens_is_lora_there_and_nothing_elsewhere(family):
    batch, updates = hf_prompt(family), []
    config = peft.LoraConfig(init_lora_weights=False, target_modules=r".*language_model.*\.[qkvo]_proj")
    for restrict in (lambda model: model, tune.at_visual_tokens):
        torch.manual_seed(1)
        model = restrict(peft.get_peft_model(tiny_hf_vlm(family), config))
        for name, module in model.named_modules():
            if ".lora_B." in name:
                module.register_forward_hook(lambda _, args, update: updates.append(update))
        logits_of(model, batch)
    visual = batch["input_ids"] == PICTURE
    plain, restricted = updates[:8], updates[8:]  # q, k, v, o of both layers
    assert not any(update[~visual].any() for update in restricted)
    for free, update in zip(plain[:3], restricted):  # q, k and v of the first layer have the same input in both models
        torch.testing.assert_close(update[visual], free[visual])


def test_lora_at_visual_tokens_stays_so_however_often_it_is_saved_and_is_never_merged(tmp_path):
    config = peft.LoraConfig(init_lora_weights=False, target_modules=r".*language_model.*v_proj")
    model = tune.at_visual_tokens(peft.get_peft_model(tiny_hf_vlm(), config))
    expected = logits_of(model, hf_prompt())
    for folder in (tmp_path / "once", tmp_path / "twice"):
        model.save_pretrained(folder)
        for options in ({}, {"low_cpu_mem_usage": True}):
            with pytest.raises(ValueError, match=r"at visual tokens: use load_at_visual_tokens\(\)"):
                peft.PeftModel.from_pretrained(tiny_hf_vlm(), folder, **options)
        with pytest.raises(ValueError, match=r"at visual tokens: use load_at_visual_tokens\(\)"):
            tiny_hf_vlm().load_adapter(folder)
        model = tune.load_at_visual_tokens(tiny_hf_vlm(), folder)
        for merge in (model.merge_and_unload, model.merge_adapter):
            with pytest.raises(ValueError, match="cannot be merged"):
                merge()
        assert torch.equal(logits_of(model, hf_prompt()), expected)


# What is refused
def refusal(capsys, *command):
    """The one line that a refused command prints."""
    with pytest.raises(SystemExit) as refused:
        tuned(*command)
    assert refused.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_run_goes_on_only_with_the_method_the_rank_and_the_heads_that_it_began_with(run, capsys):
    folder, method, _ = run
    (other,) = {"lora", "image_lora"} - {method} if method != "lora_at_visual_tokens" else {"lora"}
    checkpoint = ["--resume_from_checkpoint", str(folder / method / "one" / "checkpoint-6")]
    assert f"has --method {method}, not {other}" in refusal(capsys, folder, other, "bad", *checkpoint)
    assert "has --r 8, not 4" in refusal(capsys, folder, method, "bad", *checkpoint, "--r", "4")
    assert "has --num_heads None, not 2" in refusal(capsys, folder, method, "bad", *checkpoint, "--num_heads", "2")


BAD_LINES = {
    "no JSON": ("{'images'", "JSONDecodeError"),
    "other keys": ('{"messages": []}', "KeyError: 'images'"),
    "a string for a list": (line("a.png"), "images, prompt and completion must be lists"),
    "no such image": (line(["nowhere.png"]), "No such file or directory"),
    "a truncated image": (line(["truncated.png"]), "OSError: image file is truncated"),
    "a placeholder in a text": (line(["a.png"], prompt="a <image> cat"), "a text contains the placeholder of an image"),
    "two images, one placeholder": (line(["a.png", "b.png"], prompt=PARTS), "Number of images provided (2) does not"),
    "one image, two placeholders": (line(["a.png"], prompt=PARTS[:1] + PARTS), "Number of images provided (1) does"),
    "an unknown role": (line(["a.png"], role="human"), "Invalid role in message: human"),
    "no completion": ('{"images": [], "prompt": [], "completion": []}', "IndexError: list index out of range"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_before_training_begins(name, folders, tmp_path, capsys):
    bad, sentence = BAD_LINES[name]
    file = folders["Llava"] / "bad.jsonl"
    file.write_text(f"{line(['a.png'])}\n{bad}\n")
    refused = refusal(capsys, folders["Llava"], "image_lora", "bad", "--train_file", str(file))
    assert f"{file}, line 2: " in refused
    assert sentence in refused


@pytest.mark.parametrize("method", METHODS)
def test_a_file_without_any_image_teaches_lora_alone(method, folders, tmp_path, capsys):
    file = tmp_path / "text.jsonl"
    file.write_text(line([]))
    command = folders["Llava"], method, f"{method}/text", "--train_file", str(file)
    if method == "lora":
        tuned(*command)
    else:
        assert f"no example of {file} has an image, and {method} learns from" in refusal(capsys, *command)


OPTIONS_REFUSED = [
    (["--method", "dora"], "invalid choice: 'dora'"),
    (["--resume_from_checkpoint", "no"], "no is not the folder of a complete checkpoint"),
    (["--r", "0"], "r must be an integer in 1..32"),
    (["--num_heads", "5"], "num_heads must be in 1..4, got 5"),
    (["--max_length", "2"], "train.jsonl, line 1: ValueError: no token of the completion is left to learn"),
    (["--train_file", "nowhere.jsonl"], "No such file or directory: 'nowhere.jsonl'"),
]


@pytest.mark.parametrize("options, sentence", OPTIONS_REFUSED)
def test_a_bad_option_is_refused_in_a_sentence(options, sentence, folders, capsys):
    assert sentence in refusal(capsys, folders["Llava"], "image_lora", "bad", *options)


def test_without_the_packages_it_says_what_to_install():
    script = f"import runpy, sys; sys.modules['torch'] = None; runpy.run_path({tune.__file__!r}, run_name='__main__')"
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1
    assert 'pip install . "trl>=1.16" peft datasets torchvision' in process.stderr
