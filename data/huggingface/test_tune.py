"""tune.py on tiny random models: three methods on two families, how a run goes on, and what is refused."""

import json
import subprocess
import sys
from functools import partial

import pytest
import torch
from PIL import Image

import imagelora
from data.huggingface.test_huggingface import PICTURE, TEXT, TWO_FAMILIES, hf_prompt, processor_for, tiny_hf_vlm
from test_imagelora import logits_of

transformers = pytest.importorskip("transformers", minversion="5")
peft, _, _ = map(pytest.importorskip, ("peft", "trl", "datasets"))
from data.huggingface import tune  # noqa: E402

METHODS = ["image_lora", "lora", "lora_at_visual_tokens"]
OPTIONS = "--learning_rate 0.02 --num_train_epochs 3 --per_device_train_batch_size 1 --gradient_accumulation_steps 2"
OPTIONS += " --logging_steps 4 --save_steps 6 --use_cpu true --disable_tqdm true"
PARTS = [{"type": "image"}, {"type": "text", "text": "a cat"}]  # where an image stands; or else images come first


def line(images, completion="cat", prompt="a cat", role="user"):
    prompt, completion = {"role": role, "content": prompt}, {"role": "assistant", "content": completion}
    return json.dumps({"images": images, "prompt": [prompt], "completion": [completion]})


@pytest.fixture(scope="session", params=["Llava", "Qwen2_5_VL"])
def folder(request, tmp_path_factory):
    """A base, images, and a file of eight lines with one image, with two, or with none."""
    folder = tmp_path_factory.mktemp(request.param)
    processor_for(request.param).save_pretrained(folder / "base")
    tiny_hf_vlm(request.param).save_pretrained(folder / "base")
    for name, pixels in zip(("a.png", "b.png"), torch.randint(256, (2, 12, 9, 3), dtype=torch.uint8)):
        Image.fromarray(pixels.numpy()).save(folder / name)
    (folder / "truncated.png").write_bytes((folder / "a.png").read_bytes()[:200])
    lines = [line(["a.png"], "7"), line(["a.png", "b.png"], "cat 3"), line(["b.png"], prompt=PARTS), line([], "a")]
    (folder / "train.jsonl").write_text("\n".join(lines * 2))
    (folder / "text.jsonl").write_text(line([]))
    return folder


def tuned(folder, method, out, *more):
    files = f"--model {folder}/base --train_file {folder}/train.jsonl --output_dir {folder}/{out}"
    return tune.main([*f"{files} --method {method} {OPTIONS}".split(), *more])


@pytest.fixture(scope="session", params=METHODS)
def run(request, folder):
    """A family's folder, a method, and its trainer after training."""
    return folder, request.param, tuned(folder, request.param, request.param)


def weights(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def test_it_learns_and_goes_on_from_a_checkpoint_as_if_it_had_never_stopped(run):
    folder, method, trainer = run
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    again = tuned(folder, method, "again", "--resume_from_checkpoint", f"{folder}/{method}/checkpoint-6")
    torch.testing.assert_close(weights(again.model), weights(trainer.model), rtol=0, atol=0)


@pytest.mark.parametrize("saved", [".", "checkpoint-12"])
def test_results_and_checkpoints_load_on_a_fresh_base_and_text_alone_stays_the_bases_bit_for_bit(run, saved):
    """Plain LoRA changes it."""
    folder, method, trainer = run
    saved = folder / method / saved
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


def test_the_best_heads_are_chosen_printed_kept_in_the_file_and_kept_when_a_run_goes_on(folder, capsys):
    trainer = tuned(folder, "image_lora", "heads", "--num_heads", "3")
    heads = torch.load(folder / "heads" / "adapter.pt")["kv_indices"]
    assert sum(map(len, heads.values())) == 3
    assert f"3 of 4 value heads, by the exact probe: {trainer.model.image_lora.heads}" in capsys.readouterr().out
    checkpoint = ["--resume_from_checkpoint", f"{folder}/heads/checkpoint-6"]
    again = tuned(folder, "image_lora", "again", "--num_heads", "3", *checkpoint)
    assert "value heads" not in capsys.readouterr().out  # they are not chosen again
    torch.testing.assert_close(weights(again.model), weights(trainer.model), rtol=0, atol=0)


# LoRA at visual tokens
@TWO_FAMILIES
def test_lora_at_visual_tokens_is_lora_there_and_nothing_elsewhere(family):
    batch, updates = hf_prompt(family), []
    config = peft.LoraConfig(init_lora_weights=False, target_modules=r".*language_model.*v_proj")
    model = peft.get_peft_model(tiny_hf_vlm(family), config)
    for name, module in model.named_modules():
        if ".lora_B." in name:
            module.register_forward_hook(lambda _, args, update: updates.append(update))
    logits_of(model, batch)
    logits_of(tune.at_visual_tokens(model), batch)
    visual = batch["input_ids"] == PICTURE
    plain, _, first, second = updates  # of the two layers, at first of plain LoRA
    assert torch.equal(first[visual], plain[visual])
    assert second[visual].any()
    assert not first[~visual].any()
    assert not second[~visual].any()


def test_lora_at_visual_tokens_stays_so_however_often_it_is_saved_and_is_never_merged(tmp_path):
    config = peft.LoraConfig(init_lora_weights=False, target_modules=r".*language_model.*v_proj")
    model = tune.at_visual_tokens(peft.get_peft_model(tiny_hf_vlm(), config))
    expected = logits_of(model, hf_prompt())
    for folder in (tmp_path / "once", tmp_path / "twice"):
        model.save_pretrained(folder)
        model = tune.load_at_visual_tokens(tiny_hf_vlm(), folder)
        assert torch.equal(logits_of(model, hf_prompt()), expected)
        for merge in (model.merge_and_unload, model.merge_adapter):
            with pytest.raises(ValueError, match="cannot be merged"):
                merge()
        for open_alone in (partial(peft.PeftModel.from_pretrained, tiny_hf_vlm()), tiny_hf_vlm().load_adapter):
            with pytest.raises(ValueError, match=r"at visual tokens: use load_at_visual_tokens\(\)"):
                open_alone(folder)


# What is refused
def refusal(capsys, *command):
    """The one line that a refused command prints."""
    with pytest.raises(SystemExit) as refused:
        tuned(*command)
    assert refused.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_run_goes_on_only_with_the_method_the_rank_and_the_heads_that_it_began_with(run, capsys):
    folder, method, _ = run
    other = METHODS[METHODS.index(method) - 1]
    checkpoint = f"{folder}/{method}/checkpoint-6"
    for again, *options in ((other,), (method, "--r", "4"), (method, "--num_heads", "2")):
        refused = refusal(capsys, folder, again, "bad", "--resume_from_checkpoint", checkpoint, *options)
        assert f"{checkpoint} was made with --method {method} --r 8 --num_heads None; resume it with these" in refused


BAD_LINES = {
    "no JSON": ("{'images'", "JSONDecodeError"),
    "a string for the images": (line("a.png"), "No such file or directory"),
    "strings for messages": ('{"images": [], "prompt": "a", "completion": "cat"}', "TypeError: string indices must be"),
    "a truncated image": (line(["truncated.png"]), "OSError: image file is truncated"),
    "a placeholder in a text": (line([], prompt="a <image> <|image_pad|>"), "a text contains the placeholder of an"),
    "two images, one placeholder": (line(["a.png", "b.png"], prompt=PARTS), "Number of images provided (2) does not"),
    "an unknown role": (line(["a.png"], role="human"), "Invalid role in message: human"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_before_training_begins(name, folder, capsys):
    bad, sentence = BAD_LINES[name]
    file = folder / "bad.jsonl"
    file.write_text(f"{line(['a.png'])}\n{bad}\n")
    refused = refusal(capsys, folder, "image_lora", "bad", "--train_file", str(file))
    assert f"{file}, line 2: " in refused
    assert sentence in refused


BAD_OPTIONS = {
    "--train_file {}/text.jsonl": "text.jsonl has an image, and image_lora learns from images alone",
    "--train_file {}/text.jsonl --method lora_at_visual_tokens": "lora_at_visual_tokens learns from images alone",
    "--resume_from_checkpoint no": "no is no complete checkpoint",
    "--num_heads 5": "num_heads must be in 1..4, got 5",
    "--max_length 2": "train.jsonl, line 1: ValueError: no token of the completion is left to learn",
}


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_a_bad_option_is_refused_in_a_sentence(options, folder, capsys):
    assert BAD_OPTIONS[options] in refusal(capsys, folder, "image_lora", "bad", *options.format(folder).split())


def test_without_the_packages_it_says_what_to_install():
    script = f"import runpy, sys; sys.modules['torch'] = None; runpy.run_path({tune.__file__!r}, run_name='__main__')"
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1
    assert 'pip install ".[tune]"' in process.stderr
