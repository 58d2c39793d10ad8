"""tune.py on tiny random models: what it learns, from what it goes on, and what it refuses."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_huggingface import ROOT, TEXT, processor_for, tiny_hf_vlm

import imagelora
from test_imagelora import logits_of

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("trl")
pytest.importorskip("datasets")
import tune  # noqa: E402
from partial_lora import load_partial_lora  # noqa: E402
from training_file import open_image  # noqa: E402

METHODS = ["image_lora", "lora", "partial_lora"]
FILES = dict.fromkeys(METHODS, "adapter_model.safetensors") | {"image_lora": "adapter.pt"}
OPTIONS = "--learning_rate 0.02 --num_train_epochs 3 --per_device_train_batch_size 1 --gradient_accumulation_steps 2"
OPTIONS += " --logging_steps 4 --save_steps 6"
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
    lines = [line(["a.png"], "7"), line(["a.png", "b.png"], "cat 3"), line(["b.png"]), line([], "a")]
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


def stopped(run, out, after):
    """A copy of a run that was killed after this step."""
    shutil.copytree(run, out)
    for checkpoint in out.glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > after:
            shutil.rmtree(checkpoint)
    return out


RESUME = ["--resume_from_checkpoint", "true"]


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
    stopped(folder / method, folder / f"again_{method}", after=6)
    again = tuned(folder, method, f"again_{method}", *RESUME)
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
        model = load_partial_lora(model, saved)
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
    assert f"3 of 4 value heads: {trainer.model.image_lora.heads}" in capsys.readouterr().out
    stopped(folder / "heads", folder / "again_heads", after=2)
    again = tuned(folder, "image_lora", "again_heads", *options, *RESUME)
    assert "value heads" not in capsys.readouterr().out  # they are not chosen again
    torch.testing.assert_close(weights(again.model), weights(trainer.model), rtol=0, atol=0)


class HighLossIsGood(tune.SFTConfig):
    def __post_init__(self):
        super().__post_init__()
        self.greater_is_better = True


@pytest.fixture
def evaluated(llava, monkeypatch):
    """Options with which a high loss counts as good, so that the first evaluation is the best."""
    monkeypatch.setattr(tune, "SFTConfig", HighLossIsGood)
    return f"--eval_file {llava}/train.jsonl --save_steps 1".split()


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_stops_early_and_keeps_the_best_model(method, llava, evaluated):
    trainer = tuned(llava, method, f"early_{method}", *evaluated, "--early_stopping_patience", "2")
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses == sorted(losses, reverse=True)
    assert len(losses) == 3  # the best one, and two more
    files = [llava / f"early_{method}" / folder / FILES[method] for folder in (".", "checkpoint-1", "checkpoint-3")]
    result, best, last = [file.read_bytes() for file in files]
    assert result == best
    assert best != last


@pytest.mark.parametrize("method", METHODS)
def test_a_run_whose_folder_was_renamed_still_ends_with_its_best_model(method, llava, evaluated):
    options = [*evaluated, "--max_steps", "3"]
    tuned(llava, method, f"best_{method}", *options)
    result = (llava / f"best_{method}" / FILES[method]).read_bytes()
    renamed = stopped(llava / f"best_{method}", llava / f"renamed_{method}", after=2)
    (llava / f"best_{method}").rename(llava / f"away_{method}")
    tuned(llava, method, f"renamed_{method}", *options, *RESUME)
    assert (renamed / FILES[method]).read_bytes() == result


def test_a_run_that_has_ended_does_not_go_on(llava, evaluated, capsys):
    """transformers would train one step more."""
    options = [*evaluated, "--early_stopping_patience", "2"]
    tuned(llava, "lora", "ended", *options)
    (llava / "ended" / FILES["lora"]).unlink()  # it was killed before the result was saved
    refused = refusal(capsys, llava, "lora", "ended", *options, *RESUME)
    assert refused.endswith(f"the run in {llava}/ended has ended; its result is in {llava}/ended/checkpoint-1, too")


def test_a_checkpoint_is_complete_before_the_old_one_is_deleted(llava, llava_run, monkeypatch):
    """However early the run is killed, it can go on."""
    folder = llava / "killed_early"
    rmtree = shutil.rmtree

    def kill(path, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", kill)
    options = "--save_steps 4 --save_total_limit 1".split()
    with pytest.raises(KeyboardInterrupt):
        tuned(llava, "image_lora", folder.name, *options)
    monkeypatch.undo()
    rmtree(folder / "checkpoint-4")
    tuned(llava, "image_lora", folder.name, *options, *RESUME)
    assert (folder / "adapter.pt").read_bytes() == (llava_run / "adapter.pt").read_bytes()
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-12"]


def test_the_precision_of_the_model_is_chosen(llava):
    model = tuned(llava, "image_lora", "float32", "--dtype", "float32", "--max_steps", "1").model
    assert model.dtype == torch.float32


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_has_diverged_stops_and_writes_no_result(method, llava):
    with pytest.raises(SystemExit, match="the run has diverged: .*; try a lower --learning_rate"):
        tuned(llava, method, f"diverged_{method}", "--learning_rate", "1e38", "--save_steps", "1")
    assert not (llava / f"diverged_{method}" / FILES[method]).exists()


# 2. The training file
def test_no_text_is_rewritten_and_only_the_completion_is_learned(llava):
    """Neither an answer that is JSON, nor one in a conversation."""
    lines = [line(["a.png"], answer) for answer in ANSWERS]
    for answer in ANSWERS:
        prompt = [turn("user", "a cat"), turn("assistant", answer), turn("user", "3")]
        lines.append(json.dumps({"images": ["a.png"], "prompt": prompt, "completion": [turn("assistant", answer)]}))
    (llava / "json.jsonl").write_text("\n\n".join(lines))  # blank lines are skipped
    options = f"--train_file {llava}/json.jsonl --num_train_epochs 1".split()
    trainer = tuned(llava, "image_lora", "json", *options)
    tokenizer = trainer.processing_class.tokenizer
    assert len(trainer.train_dataset) == len(lines)
    for i, row in enumerate(trainer.train_dataset):
        batch = trainer.data_collator([row])
        learned = batch["labels"][batch["labels"] != -100]
        assert tokenizer.decode(learned) == f"{ANSWERS[i % 5]} </s>"
        if i >= 5:
            assert f"a cat {ANSWERS[i % 5]} </s> 3" in tokenizer.decode(batch["input_ids"][0])


def test_images_stand_before_the_first_message_of_the_user(llava):
    prompt = [turn("system", "1"), turn("user", "2"), turn("assistant", "3"), turn("user", "4")]
    example = {"images": ["a.png", "b.png"], "prompt": prompt, "completion": [turn("assistant", "5")]}
    (llava / "two.jsonl").write_text(json.dumps(example))
    (row,) = tune.read_examples(f"{llava}/two.jsonl")
    batch = tune.Collator(processor_for("Llava"), None, True)([row])
    words = processor_for("Llava").tokenizer.decode(batch["input_ids"][0]).replace("<image> ", "<image>")
    words = re.sub("(<image>)+", "<image>", words)
    assert words == "1 a <image>a a <image>a 2 3 </s> 4 5 </s>"


def test_a_picture_of_16_bits_keeps_its_content(tmp_path):
    values = torch.arange(0, 2**16, 257, dtype=torch.int32).numpy().astype("uint16")[None]
    Image.fromarray(values).save(tmp_path / "deep.png")
    image = open_image(tmp_path / "deep.png")
    assert image.mode == "RGB"
    assert [image.getpixel((i, 0)) for i in range(256)] == [(i, i, i) for i in range(256)]


def test_workers_find_a_bad_line_as_one_process_does(llava, capsys):
    (llava / "bad.jsonl").write_text(f"{line(['a.png'])}\n{line(['truncated.png'])}\n")
    options = ["--train_file", f"{llava}/bad.jsonl", "--dataloader_num_workers", "2"]
    refused = refusal(capsys, llava, "image_lora", "bad", *options)
    assert "bad.jsonl, line 2: OSError: image file is truncated" in refused


# 3. Going on, or refusing to
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
    "--dtype float32": "--dtype bfloat16",
    "--num_train_epochs 2": "--num_train_epochs 3",
    "--train_file {}/text.jsonl --method lora": "--train_file of sha256 ",
    "--train_file {}/elsewhere/train.jsonl": "--train_file of sha256 ",
    "--model {}/other": "--model of sha256 ",
}


@pytest.mark.parametrize("options", OTHER)
def test_a_run_goes_on_only_with_what_it_began_with(options, llava, llava_run, capsys):
    """With the same images, too: elsewhere there is another a.png."""
    if not (llava / "other").exists():
        shutil.copytree(llava / "base", llava / "other")
        other = tiny_hf_vlm()
        other.lm_head.weight.data += 1
        other.save_pretrained(llava / "other")
        (llava / "elsewhere").mkdir()
        shutil.copy(llava / "train.jsonl", llava / "elsewhere")
        for name in ("a.png", "b.png"):
            shutil.copy(llava / "b.png", llava / "elsewhere" / name)
    more = ["--save_steps", "4", *RESUME, *options.format(llava).split()]
    refused = refusal(capsys, llava, "image_lora", "run", *more)
    assert f"{llava_run} was made with " in refused
    assert OTHER[options] in refused
    assert refused.endswith("; resume it with these")


def test_it_goes_on_from_the_last_complete_checkpoint(llava, llava_run, capsys):
    """Also in other places and with other logs; and not from one that was killed while it was written."""
    expected = torch.load(llava_run / "adapter.pt")["layers"]["0"]["B"]
    stopped(llava_run, llava / "killed", after=8)
    shutil.copytree(llava_run / "checkpoint-4", llava / "killed" / "checkpoint-9")
    for name in ("train.jsonl", "a.png", "b.png"):
        (llava / "moved").mkdir(exist_ok=True)
        shutil.copy(llava / name, llava / "moved")
    state = llava / "killed" / "checkpoint-9" / "trainer_state.json"
    state.write_text(state.read_text()[:-3])
    (llava / "killed" / "checkpoint-8" / "training_args.bin").unlink()  # only the program that wrote it can read it
    options = f"--save_steps 4 --train_file {llava}/moved/train.jsonl --logging_steps 1".split()
    again = tuned(llava, "image_lora", "killed", *options, *RESUME)
    assert torch.equal(again.model.image_lora.layers["0"].B, expected)
    assert again.state.global_step == 12
    for number in (4, 8, 12):
        (llava / "killed" / f"checkpoint-{number}" / "trainer_state.json").unlink()
    refused = refusal(capsys, llava, "image_lora", "killed", *options, *RESUME)
    assert f"no checkpoint in {llava}/killed is complete; start again with a new --output_dir" in refused


@pytest.mark.parametrize("place", ["base", "link", ".", "run"])
def test_nothing_is_overwritten(place, llava, llava_run, capsys):
    """Neither a model nor another run, and not through a link either."""
    if place == "link" and not (llava / "link").exists():
        (llava / "link").symlink_to("base")
    before = {path: path.read_bytes() for path in (llava / "base").iterdir()}
    for method in METHODS:
        assert "is not empty; choose a new one, or" in refusal(capsys, llava, method, place)
    assert {path: path.read_bytes() for path in (llava / "base").iterdir()} == before


# 4. What else is refused
def example(images=(), prompt=({"role": "user", "content": "a"},), completion=({"role": "assistant", "content": "a"},)):
    return json.dumps({"images": images, "prompt": prompt, "completion": completion})


KEYS = "a line needs the keys images, prompt and completion, and no others"
LISTS = "images, prompt and completion must be lists"
TURN = "a turn needs a role and a content, which is a string, and no more"
ONE_TURN = "a completion must be one turn of the assistant, after one of the user"
BAD_LINES = {
    "no JSON": ("{'images'", "JSONDecodeError"),
    "no object": ("[]", f"{KEYS}; got []"),
    "a key that is missing": ('{"images": [], "prompt": []}', KEYS),
    "a key that would be lost": (line([])[:-1] + ', "tools": []}', KEYS),
    "a key that stands twice": ('{"images": ["a.png"], ' + line([])[1:], "a key stands twice in {'images'"),
    "a string for images": (example(images="a.png"), LISTS),
    "an empty string for images": (example(images=""), LISTS),
    "a string for messages": (example(prompt="a"), LISTS),
    "strings for messages": (example(prompt=["a"]), f"{TURN}; got 'a'"),
    "a turn without a role": (line([]).replace('"role": "user", ', ""), TURN),
    "a key of a turn that would be lost": (line([]).replace('"role"', '"name": "Ada", "role"'), TURN),
    "a number for a content": (line([], 7), TURN),
    "parts": (line([], prompt=[{"type": "text", "text": "a"}]), TURN),
    "a role that does not exist": (line([], role="ser"), ONE_TURN),
    "a completion without turns": (example(completion=[]), ONE_TURN),
    "a completion of two turns": (example(completion=[turn("user", "a"), turn("assistant", "a")]), ONE_TURN),
    "a prompt that ends with the assistant": (line([], role="assistant"), ONE_TURN),
    "no prompt": (example(prompt=[]), ONE_TURN),
    "an empty answer": (line([], " "), "the completion is empty"),
    "a missing image": (line(["c.png"]), "FileNotFoundError"),
    "a truncated image": (line(["truncated.png"]), "OSError: image file is truncated"),
    "a placeholder in a text": (line([], prompt="a <image> <|image_pad|>"), "a text contains the placeholder of an"),
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
    refused = refusal(capsys, llava, "image_lora", "bad", "--eval_file", f"{llava}/bad.jsonl")
    assert f"{llava}/bad.jsonl, line 1: OSError" in refused


BAD_OPTIONS = {
    "--train_file {}/text.jsonl": "no example of {}/text.jsonl has an image, as image_lora needs",
    "--train_file {}/text.jsonl --method partial_lora": "has an image, as partial_lora needs",
    "--num_heads 5": "num_heads must be in 1..4, got 5",
    "--num_heads 2 --method lora": "--num_heads is for --method image_lora; leave it out",
    "--max_length 2": "train.jsonl, line 1: ValueError: no token of the completion is left to learn",
    "--early_stopping_patience 2": "--early_stopping_patience needs --eval_file",
    "--resume_from_checkpoint true": "no checkpoint in {}/bad is complete",
    "--model {}/no": "no",
    "--model {}/cut": "incomplete metadata, file not fully covered",
    "--dtype float16": "argument --dtype: invalid choice: 'float16'",
    "--lr_scheduler_type no": "no is not a valid SchedulerType",
    "--push_to_hub true": "--push_to_hub true is no option of tune.py, which is there to be copied and changed",
    "--packing": "--packing is no option of tune.py",
    "--lr 1": "--lr 1 is no option of tune.py",  # no abbreviations
    "--model_init_kwargs [] --init_from run": "is no option of tune.py",
}


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_a_bad_option_is_refused_in_a_sentence(options, llava, capsys):
    if not (llava / "cut").exists():
        shutil.copytree(llava / "base", llava / "cut")
        weights = (llava / "cut" / "model.safetensors").read_bytes()
        (llava / "cut" / "model.safetensors").write_bytes(weights[:-100])
    refused = refusal(capsys, llava, "image_lora", "bad", *options.format(llava).split())
    assert BAD_OPTIONS[options].format(llava) in refused


def test_the_extra_tune_installs_what_the_scripts_import():
    """And torchvision, which processors of images import."""
    extra = re.search(r"^tune = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.M).group(1)
    installed = set(re.findall(r'"([a-z]+)', extra))
    imported = set()
    for name in ("tune.py", "training_file.py", "partial_lora.py"):
        source = (Path(tune.__file__).parent / name).read_text()
        imported |= set(re.findall(r"^ *(?:from|import) (\w+)", source, re.M))
    own = {"torch", "imagelora", "training_file", "partial_lora"}
    packages = {"pillow" if name == "PIL" else name for name in imported - own - set(sys.stdlib_module_names)}
    assert packages | {"torchvision"} == installed
