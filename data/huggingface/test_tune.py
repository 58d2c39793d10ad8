"""tune.py on tiny random models: what it learns, from what it goes on, and what it refuses."""

import json
import re
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_huggingface import PICTURE, ROOT, TEXT, TWO_FAMILIES, hf_prompt, processor_for, tiny_hf_vlm

import imagelora
from test_imagelora import logits_of, loss_of

transformers = pytest.importorskip("transformers")
peft, _, _ = map(pytest.importorskip, ("peft", "trl", "datasets"))
import tune  # noqa: E402
from lora_at_visual_tokens import at_visual_tokens, load_at_visual_tokens  # noqa: E402
from training_file import open_image, rows_of  # noqa: E402

METHODS = ["image_lora", "lora", "lora_at_visual_tokens"]
FILES = dict.fromkeys(METHODS, "adapter_model.safetensors") | {"image_lora": "adapter.pt"}
OPTIONS = "--learning_rate 0.02 --num_train_epochs 3 --per_device_train_batch_size 1 --gradient_accumulation_steps 2"
OPTIONS += " --logging_steps 4 --save_steps 6 --use_cpu true --disable_tqdm true"
IMAGE = {"type": "image"}
PARTS = [IMAGE, {"type": "text", "text": "a cat"}]  # where an image stands; or else images come first
ANSWERS = ["null", "7", "true", '"cat"', "[412, 88]"]  # strings that are JSON, too


def turn(role, content):
    return {"role": role, "content": content}


def line(images, completion="cat", prompt="a cat", role="user"):
    return json.dumps({"images": images, "prompt": [turn(role, prompt)], "completion": [turn("assistant", completion)]})


def make_folder(family, folder):
    """A base, images, and a file of eight lines with one image, with two, or with none."""
    processor_for(family).save_pretrained(folder / "base")
    tiny_hf_vlm(family).save_pretrained(folder / "base")
    for name, pixels in zip(("a.png", "b.png"), torch.randint(256, (2, 12, 9, 3), dtype=torch.uint8)):
        Image.fromarray(pixels.numpy()).save(folder / name)
    (folder / "truncated.png").write_bytes((folder / "a.png").read_bytes()[:200])
    lines = [line(["a.png"], "7"), line(["a.png", "b.png"], "cat 3"), line(["b.png"], prompt=PARTS), line([], "a")]
    (folder / "train.jsonl").write_text("\n".join(lines * 2))
    (folder / "text.jsonl").write_text(line([]))
    return folder


@pytest.fixture(scope="session", params=["Llava", "Qwen2_5_VL"])
def folder(request, tmp_path_factory):
    return make_folder(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def llava(tmp_path_factory):
    return make_folder("Llava", tmp_path_factory.mktemp("llava"))


def tuned(folder, method, out, *more):
    files = f"--model {folder}/base --train_file {folder}/train.jsonl --output_dir {folder}/{out}"
    return tune.main([*f"{files} --method {method} {OPTIONS}".split(), *more])


@pytest.fixture(scope="session", params=METHODS)
def run(request, folder):
    """A family's folder, a method, and its trainer after training."""
    return folder, request.param, tuned(folder, request.param, request.param)


@pytest.fixture(scope="session")
def llava_run(llava):
    """The folder of a run of Image-LoRA with three checkpoints."""
    tuned(llava, "image_lora", "run", "--save_steps", "4")
    return llava / "run"


def weights(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def fresh(folder):
    return transformers.AutoModelForImageTextToText.from_pretrained(folder / "base", dtype=torch.bfloat16)


# 1. Training, its results, and going on
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
    model = fresh(folder)
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    text = logits_of(model, TEXT)
    if method == "image_lora":
        imagelora.load(model, saved / "adapter.pt")
        with pytest.raises(ValueError, match="Unrecognized model"):  # it would have random weights
            transformers.AutoModelForImageTextToText.from_pretrained(saved)
    elif method == "lora":
        model = peft.PeftModel.from_pretrained(model, saved)
    else:
        model = load_at_visual_tokens(model, saved)
    assert torch.equal(logits_of(model, TEXT), text) == (method != "lora")
    assert torch.equal(logits_of(model, batch), logits_of(trainer.model.eval(), batch))
    assert type(transformers.AutoProcessor.from_pretrained(saved)) is type(trainer.processing_class)


def test_the_best_heads_are_chosen_printed_kept_in_the_file_and_kept_when_a_run_goes_on(folder, capsys):
    """They are judged on examples that have images, which are rare in this file."""
    lines = [line([], "a")] * 40 + [line(["a.png"], "7")]
    (folder / "rare.jsonl").write_text("\n".join(lines))
    options = f"--num_heads 3 --train_file {folder}/rare.jsonl --max_steps 4 --save_steps 2".split()
    trainer = tuned(folder, "image_lora", "heads", *options)
    heads = torch.load(folder / "heads" / "adapter.pt")["kv_indices"]
    assert sum(map(len, heads.values())) == 3
    assert f"3 of 4 value heads, by the exact probe: {trainer.model.image_lora.heads}" in capsys.readouterr().out
    checkpoint = ["--resume_from_checkpoint", f"{folder}/heads/checkpoint-2"]
    again = tuned(folder, "image_lora", "again", *options, *checkpoint)
    assert "value heads" not in capsys.readouterr().out  # they are not chosen again
    torch.testing.assert_close(weights(again.model), weights(trainer.model), rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_stops_early_and_keeps_the_best_model(llava, method):
    """Here a high loss counts as good, so the first evaluation is the best, and two more end the run."""
    options = f"--eval_file {llava}/train.jsonl --eval_strategy steps --eval_steps 1 --save_steps 1"
    options += " --load_best_model_at_end true --greater_is_better true --early_stopping_patience 2"
    trainer = tuned(llava, method, f"early_{method}", *options.split())
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses == sorted(losses, reverse=True)
    assert len(losses) == 3
    files = [llava / f"early_{method}" / folder / FILES[method] for folder in (".", "checkpoint-1", "checkpoint-3")]
    result, best, last = [file.read_bytes() for file in files]
    assert result == best
    assert best != last


@pytest.mark.parametrize("method", METHODS)
def test_a_run_can_start_from_the_result_of_another_and_go_on(llava, method):
    first = tuned(llava, method, f"first_{method}", "--max_steps", "2")
    options = ["--init_from", f"{llava}/first_{method}", "--max_steps", "1", "--save_steps", "1"]
    same = tuned(llava, method, f"second_{method}", *options, "--learning_rate", "0")
    torch.testing.assert_close(weights(same.model), weights(first.model), rtol=0, atol=0)
    second = tuned(llava, method, f"second_{method}", *options)
    assert any(not torch.equal(a, b) for a, b in zip(weights(second.model).values(), weights(first.model).values()))


def test_options_of_the_model_reach_it(llava):
    options = ["--model_init_kwargs", '{"dtype": "float32", "attn_implementation": "eager"}', "--max_steps", "1"]
    model = tuned(llava, "image_lora", "float32", *options).model
    assert model.dtype == torch.float32
    assert model.config._attn_implementation == "eager"


# 2. The training file
def test_no_text_is_rewritten(llava):
    """Neither an answer that is JSON, nor one beside parts, nor in a conversation."""
    lines = [line(["a.png"], answer) for answer in ANSWERS]
    lines += [line(["a.png"], [{"type": "text", "text": answer}], PARTS) for answer in ANSWERS]
    for answer in ANSWERS:
        prompt = [turn("user", PARTS), turn("assistant", [{"type": "text", "text": answer}]), turn("user", [IMAGE])]
        turns = {"images": ["a.png", "b.png"], "prompt": prompt, "completion": [turn("assistant", answer)]}
        lines.append(json.dumps(turns))
    (llava / "json.jsonl").write_text("\n".join(lines))
    options = f"--train_file {llava}/json.jsonl --num_train_epochs 1".split()
    trainer = tuned(llava, "image_lora", "json", *options)
    tokenizer = trainer.processing_class.tokenizer
    assert len(trainer.train_dataset) == len(lines)
    for i, row in enumerate(trainer.train_dataset):
        batch = trainer.data_collator([row])
        learned = batch["labels"][batch["labels"] != -100]
        assert tokenizer.decode(learned) == f"{ANSWERS[i % 5]} </s>"
        if i >= 10:
            assert f"a cat {ANSWERS[i % 5]} </s>" in tokenizer.decode(batch["input_ids"][0])


def test_each_of_the_assistants_turns_in_a_completion_is_learned_and_a_users_is_not(llava):
    """Images are shown from their turn on."""
    completion = [turn("assistant", "1"), turn("user", PARTS), turn("assistant", "2"), turn("user", "3")]
    example = {"images": ["a.png", "b.png"], "prompt": [turn("user", PARTS)], "completion": completion}
    completion[-1]["content"] = [{"type": "text", "text": "3"}]
    first, second = rows_of(example, llava)
    assert first["images"] == [f"{llava}/a.png"]
    assert json.loads(first["completion"]) == [turn("assistant", "1")]
    assert second["images"] == [f"{llava}/a.png", f"{llava}/b.png"]
    assert json.loads(second["prompt"]) == [turn("user", PARTS), *completion[:2]]
    assert json.loads(second["completion"]) == [turn("assistant", "2")]


def test_a_picture_of_16_bits_keeps_its_content(tmp_path):
    values = torch.arange(0, 2**16, 257, dtype=torch.int32).numpy().astype("uint16")[None]
    Image.fromarray(values).save(tmp_path / "deep.png")
    image = open_image(tmp_path / "deep.png")
    assert image.mode == "RGB"
    assert [image.getpixel((i, 0)) for i in range(256)] == [(i, i, i) for i in range(256)]


def test_workers_find_a_bad_line_as_one_process_does(llava, capsys):
    (llava / "bad.jsonl").write_text(f"{line(['a.png'])}\n{line(['truncated.png'])}\n")
    options = ["--train_file", f"{llava}/bad.jsonl", "--dataset_num_proc", "2"]
    refused = refusal(capsys, llava, "image_lora", "bad", *options)
    assert "bad.jsonl, line 2: OSError: image file is truncated" in refused


# 3. LoRA at visual tokens
def lora_at_visual_tokens(family="Llava"):
    config = peft.LoraConfig(init_lora_weights=False, target_modules=r".*language_model.*v_proj")
    return at_visual_tokens(peft.get_peft_model(tiny_hf_vlm(family), config))


@TWO_FAMILIES
def test_lora_at_visual_tokens_is_lora_there_and_nothing_elsewhere(family):
    batch, updates = hf_prompt(family), []
    config = peft.LoraConfig(init_lora_weights=False, target_modules=r".*language_model.*v_proj")
    model = peft.get_peft_model(tiny_hf_vlm(family), config)
    for name, module in model.named_modules():
        if ".lora_B." in name:
            module.register_forward_hook(lambda _, args, update: updates.append(update))
    logits_of(model, batch)
    logits_of(at_visual_tokens(model), batch)
    visual = batch["input_ids"] == PICTURE
    plain, _, first, second = updates  # of the two layers, at first of plain LoRA
    assert torch.equal(first[visual], plain[visual])
    assert second[visual].any()
    assert not first[~visual].any()
    assert not second[~visual].any()


def test_lora_at_visual_tokens_stays_so_however_often_it_is_saved_and_is_never_merged(tmp_path):
    model = lora_at_visual_tokens()
    expected = logits_of(model, hf_prompt())
    for folder in (tmp_path / "once", tmp_path / "twice"):
        model.save_pretrained(folder)
        model = load_at_visual_tokens(tiny_hf_vlm(), folder)
        assert torch.equal(logits_of(model, hf_prompt()), expected)
        for merge in (model.merge_and_unload, model.merge_adapter):
            with pytest.raises(ValueError, match="cannot be merged"):
                merge()
        for open_alone in (partial(peft.PeftModel.from_pretrained, tiny_hf_vlm()), tiny_hf_vlm().load_adapter):
            with pytest.raises(ValueError, match=r"at visual tokens: use load_at_visual_tokens\(\)"):
                open_alone(folder)


def test_lora_at_visual_tokens_never_takes_the_mask_of_another_call():
    """A part of the model is refused, in training as well. With a gradient checkpoint a layer may run again."""
    model, batch = lora_at_visual_tokens(), hf_prompt()
    base = model.get_base_model()
    logits_of(model, batch)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="no call of model"):
            base.model(**batch)
    expected = gradients(model, batch)
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradients(model, batch), expected)


def gradients(model, batch):
    model.zero_grad()
    loss_of(model, batch).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_lora_at_visual_tokens_needs_input_ids_by_name_or_as_the_first_argument():
    model, batch = lora_at_visual_tokens(), hf_prompt()
    expected = logits_of(model, batch)
    ids = batch.pop("input_ids")
    assert torch.equal(model(ids, **batch).logits, expected)
    embeddings = model.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match="LoRA at visual tokens finds them in input_ids"):
        model(inputs_embeds=embeddings, **batch)


def test_lora_at_all_tokens_is_not_loaded_as_lora_at_visual_tokens(tmp_path):
    config = peft.LoraConfig(target_modules=r".*language_model.*v_proj")
    peft.get_peft_model(tiny_hf_vlm(), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="adapts all tokens"):
        load_at_visual_tokens(tiny_hf_vlm(), tmp_path)


# 4. Going on, or refusing to
def refusal(capsys, *command):
    """The one line that a refused command prints."""
    with pytest.raises(SystemExit) as refused:
        tuned(*command)
    assert refused.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


OTHER = {
    "--method lora": "--method image_lora",
    "--r 4": "--r 8",
    "--num_heads 2": "--num_heads None",
    "--learning_rate 0.01": "--learning_rate 0.02",
    "--optim sgd": "--optim adamw_torch",
    "--num_train_epochs 2": "--num_train_epochs 3",
    "--train_file {}/text.jsonl": "--train_file of sha256 ",
    "--model {}/other": "--model of sha256 ",
}


@pytest.mark.parametrize("options", OTHER)
def test_a_run_goes_on_only_with_what_it_began_with(options, llava, llava_run, capsys):
    if not (llava / "other").exists():
        shutil.copytree(llava / "base", llava / "other")
        other = tiny_hf_vlm()
        other.lm_head.weight.data += 1
        other.save_pretrained(llava / "other")
    checkpoint = f"{llava_run}/checkpoint-4"
    more = ["--save_steps", "4", "--resume_from_checkpoint", checkpoint, *options.format(llava).split()]
    refused = refusal(capsys, llava, "image_lora", "bad", *more)
    assert f"{checkpoint} was made with {OTHER[options]}" in refused
    assert refused.endswith("; resume it with these")


def test_true_takes_the_last_complete_checkpoint(llava, llava_run, capsys):
    """Without training_args.bin, which only the program that wrote it can read; and not one that was killed."""
    expected = torch.load(llava_run / "adapter.pt")["layers"]["0"]["B"]
    shutil.copytree(llava_run, llava / "killed")
    (llava / "killed" / "checkpoint-12" / "tune.json").unlink()
    (llava / "killed" / "checkpoint-8" / "training_args.bin").unlink()
    again = tuned(llava, "image_lora", "killed", "--save_steps", "4", "--resume_from_checkpoint", "true")
    assert torch.equal(again.model.image_lora.layers["0"].B, expected)
    assert again.state.global_step == 12
    for number in (4, 8, 12):
        (llava / "killed" / f"checkpoint-{number}" / "optimizer.pt").unlink()
    refused = refusal(capsys, llava, "image_lora", "killed", "--save_steps", "4", "--resume_from_checkpoint", "true")
    assert "--resume_from_checkpoint true: no complete checkpoint with an optimizer is there" in refused


def test_a_checkpoint_without_an_optimizer_is_refused(llava, capsys):
    tuned(llava, "lora", "only_model", "--save_only_model", "true", "--max_steps", "2", "--save_steps", "1")
    more = ["--max_steps", "2", "--resume_from_checkpoint", f"{llava}/only_model/checkpoint-1"]
    assert "no complete checkpoint with an optimizer is there" in refusal(capsys, llava, "lora", "bad", *more)


@pytest.mark.parametrize("place", ["base", "link", "base/inside", "."])
def test_no_base_is_destroyed(place, llava, capsys):
    """Not through a link either."""
    if place == "link" and not (llava / "link").exists():
        (llava / "link").symlink_to("base")
    before = {path: path.read_bytes() for path in (llava / "base").iterdir()}
    for method in METHODS:
        refused = refusal(capsys, llava, method, place)
        assert "could overwrite the model in it; choose another folder" in refused
    assert {path: path.read_bytes() for path in (llava / "base").iterdir()} == before


# 5. What else is refused
BAD_LINES = {
    "no JSON": ("{'images'", "JSONDecodeError"),
    "no object": ("[]", "a line needs the keys images, prompt, completion and no others; got []"),
    "a key that is missing": ('{"images": [], "prompt": []}', "a line needs the keys images, prompt, completion and"),
    "a key that would be lost": (line([])[:-1] + ', "tools": []}', "a line needs the keys images, prompt, completion"),
    "strings for messages": ('{"images": [], "prompt": "a", "completion": "cat"}', "has no attribute 'get'"),
    "a turn without a role": (line([]).replace('"role": "user", ', ""), "a turn needs a role and a content"),
    "a number for a content": (line([], 7), "a turn needs a role and a content"),
    "null for a content": (line([], None), "a turn needs a role and a content"),
    "a part of an unknown form": (line([], prompt=[{"type": "image", "image": "a.png"}]), "a turn needs a role and a"),
    "a part of an unknown type": (line([], [{"type": "video", "text": "a"}]), "a turn needs a role and a content"),
    "a completion without turns": (
        '{"images": [], "prompt": [], "completion": []}',
        "no turn of the completion is the as",
    ),
    "an empty answer": (line([], ""), "a turn of the assistant in the completion is empty"),
    "no prompt": (
        '{"images": [], "prompt": [], "completion": [{"role": "assistant", "content": "a"}]}',
        "no turn comes",
    ),
    "a missing image": (line(["c.png"]), "FileNotFoundError"),
    "a truncated image": (line(["truncated.png"]), "OSError: image file is truncated"),
    "a placeholder in a text": (line([], prompt="a <image> <|image_pad|>"), "a text contains the placeholder of an"),
    "two images, one place": (line(["a.png", "b.png"], prompt=PARTS), "1 parts are images, but images names 2 files"),
    "images in turns of strings": (
        json.dumps({"images": ["a.png", "b.png"], "prompt": [turn("user", "a"), turn("assistant", "a")] * 2})[:-1]
        + ', "completion": [{"role": "assistant", "content": "a"}]}',
        "write all turns as parts",
    ),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_before_training_begins(name, llava, capsys):
    bad, sentence = BAD_LINES[name]
    file = llava / "bad.jsonl"
    file.write_text(f"{line(['a.png'])}\n{bad}\n")
    refused = refusal(capsys, llava, "image_lora", "bad", "--train_file", str(file))
    assert f"{file}, line 2: " in refused
    assert sentence in refused


def test_a_bad_line_of_the_evaluation_file_is_named_as_well(llava, capsys):
    (llava / "bad.jsonl").write_text(line(["truncated.png"]))
    options = f"--eval_file {llava}/bad.jsonl --eval_strategy epoch".split()
    assert f"{llava}/bad.jsonl, line 1: OSError" in refusal(capsys, llava, "image_lora", "bad", *options)


BAD_OPTIONS = {
    "--train_file {}/text.jsonl": "text.jsonl has an image, and image_lora learns from images alone",
    "--train_file {}/text.jsonl --method lora_at_visual_tokens": "lora_at_visual_tokens learns from images alone",
    "--resume_from_checkpoint no": "--resume_from_checkpoint no: no complete checkpoint with an optimizer is there",
    "--num_heads 5": "num_heads must be in 1..4, got 5",
    "--num_heads 2 --method lora": "--num_heads chooses heads of a new --method image_lora",
    "--max_length 2": "train.jsonl, line 1: ValueError: no token of the completion is left to learn",
    "--push_to_hub true": "--push_to_hub would upload what from_pretrained() cannot load",
    "--completion_only_loss false": "--completion_only_loss false is not supported",
    "--eval_strategy epoch": "--eval_file and --eval_strategy need each other",
    "--eval_file {}/text.jsonl": "--eval_file and --eval_strategy need each other",
    "--load_best_model_at_end true": "requires the save and eval strategy to match",
    "--early_stopping_patience 2": "--early_stopping_patience needs --eval_file and --load_best_model_at_end true",
    "--model {}/no": "no",
}


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_a_bad_option_is_refused_in_a_sentence(options, llava, capsys):
    assert BAD_OPTIONS[options] in refusal(capsys, llava, "image_lora", "bad", *options.format(llava).split())


def test_a_result_of_another_rank_is_refused_as_a_start(llava, llava_run, capsys):
    refused = refusal(capsys, llava, "image_lora", "bad", "--init_from", str(llava_run), "--r", "4")
    assert f"--init_from {llava_run} has rank 8; give --r 8" in refused


def test_the_extra_tune_installs_what_the_scripts_import():
    """And torchvision, which processors of images import."""
    extra = re.search(r"^tune = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.M).group(1)
    installed = set(re.findall(r'"([a-z]+)', extra))
    imported = set()
    for name in ("tune.py", "training_file.py", "lora_at_visual_tokens.py"):
        source = (Path(tune.__file__).parent / name).read_text()
        imported |= set(re.findall(r"^ *(?:from|import) (\w+)", source, re.M))
    own = {"torch", "imagelora", "training_file", "lora_at_visual_tokens"}
    packages = {"pillow" if name == "PIL" else name for name in imported - own - set(sys.stdlib_module_names)}
    assert packages | {"torchvision"} == installed
