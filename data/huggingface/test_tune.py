"""tune.py on tiny random models: what it learns, from what it goes on, and what it refuses."""

import json
import re
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
import tune  # noqa: E402
from partial_lora import load_partial_lora  # noqa: E402
from training_file import open_image  # noqa: E402

METHODS = ["image_lora", "lora", "partial_lora"]
OPTIONS = "--learning_rate 0.02 --num_train_epochs 3 --per_device_train_batch_size 1 --gradient_accumulation_steps 2"
OPTIONS += " --logging_steps 2 --save_steps 3"  # there are six steps, two an epoch
RESUME = ["--resume_from_checkpoint", "true"]


def turn(role, content):
    return {"role": role, "content": content}


def line(images, answer="cat", **changes):
    """A line of a training file: a question, its answer, and what is to be otherwise."""
    example = {"images": images, "prompt": [turn("user", "a cat")], "completion": [turn("assistant", answer)]}
    return json.dumps(example | changes)


def make_folder(family, folder):
    """A base, images, and a file of four lines with one image, with two, or with none."""
    processor_for(family).save_pretrained(folder / "base")
    tiny_hf_vlm(family).save_pretrained(folder / "base")
    for name, pixels in zip(("a.png", "b.png"), torch.randint(256, (2, 12, 9, 3), dtype=torch.uint8)):
        Image.fromarray(pixels.numpy()).save(folder / name)
    (folder / "truncated.png").write_bytes((folder / "a.png").read_bytes()[:200])
    frames = [Image.new("L", (8, 8), color) for color in (0, 255)]
    frames[0].save(folder / "animation.gif", save_all=True, append_images=frames[1:])
    for mode in ("F", "I"):
        Image.new(mode, (8, 8), 1).save(folder / f"{mode}.tiff")
    lines = [line(["a.png"], "7"), line(["a.png", "b.png"], "cat 3"), line(["b.png"]), line([], "a")]
    (folder / "train.jsonl").write_text("\n".join(lines))
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


def refusal(capsys, *command):
    """The one line that a refused command prints."""
    with pytest.raises(SystemExit) as refused:
        tuned(*command)
    assert refused.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.fixture(scope="session", params=METHODS)
def run(request, folder):
    """A family's folder, a method, and its trainer after training."""
    return folder, request.param, tuned(folder, request.param, request.param)


@pytest.fixture(scope="session")
def llava_run(llava):
    """The folder of a run of Image-LoRA with two checkpoints."""
    tuned(llava, "image_lora", "run")
    return llava / "run"


def adapter_of(run):
    """The file of the adapter that a run or its checkpoint holds."""
    (file,) = [path for path in run.iterdir() if path.name in ("adapter.pt", "adapter_model.safetensors")]
    return file.read_bytes()


# 1. Training, its results, and going on
def test_it_learns_and_goes_on_from_a_checkpoint_as_if_it_had_never_stopped(run):
    folder, method, trainer = run
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    stopped(folder / method, folder / f"again_{method}", after=3)
    tuned(folder, method, f"again_{method}", *RESUME)
    assert adapter_of(folder / f"again_{method}") == adapter_of(folder / method)


@pytest.mark.parametrize("saved", [".", "checkpoint-6"])
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
        model = load_partial_lora(model, saved)
    assert torch.equal(logits_of(model, TEXT), text) == (method != "lora")
    assert torch.equal(logits_of(model, batch), logits_of(trainer.model.eval(), batch))
    assert type(transformers.AutoProcessor.from_pretrained(saved)) is type(trainer.processing_class)


def test_the_best_heads_are_chosen_printed_kept_in_the_file_and_kept_when_a_run_goes_on(llava, capsys):
    """They are judged on examples that have images, which are rare in this file."""
    lines = [line([], "a")] * 40 + [line(["a.png"], "7")]
    (llava / "rare.jsonl").write_text("\n".join(lines))
    options = f"--num_heads 3 --train_file {llava}/rare.jsonl --max_steps 2 --save_steps 1".split()
    trainer = tuned(llava, "image_lora", "heads", *options)
    heads = torch.load(llava / "heads" / "adapter.pt")["kv_indices"]
    assert sum(map(len, heads.values())) == 3
    assert f"3 of 4 value heads: {trainer.model.image_lora.heads}" in capsys.readouterr().out
    stopped(llava / "heads", llava / "again_heads", after=1)
    tuned(llava, "image_lora", "again_heads", *options, *RESUME)
    assert "value heads" not in capsys.readouterr().out  # they are not chosen again
    assert adapter_of(llava / "again_heads") == adapter_of(llava / "heads")


class HighLossIsGood(tune.SFTConfig):
    def __post_init__(self):
        super().__post_init__()
        self.greater_is_better = True


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_stops_early_and_keeps_the_best_model_also_if_it_was_renamed(method, llava, capsys, monkeypatch):
    """Here a high loss counts as good, so the first evaluation is the best."""
    monkeypatch.setattr(tune, "SFTConfig", HighLossIsGood)
    options = f"--eval_file {llava}/train.jsonl --save_steps 1 --early_stopping_patience 2".split()
    run = llava / f"early_{method}"
    trainer = tuned(llava, method, run.name, *options)
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses == sorted(losses, reverse=True)
    assert len(losses) == 3  # the best one, and two more
    result = adapter_of(run)
    assert result == adapter_of(run / "checkpoint-1")
    assert result != adapter_of(run / "checkpoint-3")

    refused = refusal(capsys, llava, method, run.name, *options, *RESUME)  # transformers would train one step more
    assert refused.endswith(f"the run in {run} has ended; its result is in {run}/checkpoint-1, too")

    renamed = stopped(run, llava / f"renamed_{method}", after=2)
    run.rename(llava / f"away_{method}")
    tuned(llava, method, renamed.name, *options, *RESUME)
    assert adapter_of(renamed) == result
    assert not (renamed / "checkpoint-4").exists()  # it has gone on counting


def test_a_checkpoint_is_complete_before_the_old_one_is_deleted(llava, llava_run, monkeypatch):
    """However early the run is killed, it can go on."""
    folder = llava / "killed_early"
    rmtree = shutil.rmtree

    def kill(path, *args, **kwargs):
        if "checkpoint" in str(path):
            raise KeyboardInterrupt
        rmtree(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", kill)
    options = "--save_steps 2 --save_total_limit 1".split()
    with pytest.raises(KeyboardInterrupt):
        tuned(llava, "image_lora", folder.name, *options)
    monkeypatch.undo()
    rmtree(folder / "checkpoint-2")
    tuned(llava, "image_lora", folder.name, *options, *RESUME)
    assert adapter_of(folder) == adapter_of(llava_run)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-6"]


def test_the_precision_of_the_model_is_chosen(llava):
    model = tuned(llava, "image_lora", "float32", "--dtype", "float32", "--max_steps", "1").model
    assert model.dtype == torch.float32


@pytest.mark.parametrize("rate, what", [("1e20", "the loss is nan"), ("1e39", "a weight is not finite")])
def test_a_run_that_has_diverged_stops_and_writes_no_result(rate, what, llava):
    with pytest.raises(SystemExit, match=f"the run has diverged: {what}; try a lower --learning_rate"):
        tuned(llava, "lora", f"diverged_{rate}", "--learning_rate", rate, "--save_steps", "1")
    assert not (llava / f"diverged_{rate}" / "adapter_model.safetensors").exists()


# 2. The training file
def batches_of(llava, *lines):
    """What the model gets of each of these lines."""
    (llava / "lines.jsonl").write_text("\n\n".join(lines))  # blank lines are skipped
    collate = tune.Collator(processor_for("Llava"), None, True)
    return [collate([row]) for row in tune.read_examples(f"{llava}/lines.jsonl")]


def words_of(ids):
    return processor_for("Llava").tokenizer.decode(ids)


@pytest.mark.parametrize("answer", ["null", "7", "true", '"cat"', "[412, 88]"])  # strings that are JSON, too
def test_no_text_is_rewritten_and_only_the_completion_is_learned(answer, llava):
    """Neither an answer that is JSON, nor one in a conversation."""
    prompt = [turn("user", "a cat"), turn("assistant", answer), turn("user", "3")]
    batches = batches_of(llava, line(["a.png"], answer), line(["a.png"], answer, prompt=prompt))
    for batch in batches:
        assert words_of(batch["labels"][batch["labels"] != -100]) == f"{answer} </s>"
    assert f"a cat {answer} </s> 3" in words_of(batches[1]["input_ids"][0])


def test_images_stand_before_the_first_message_of_the_user(llava):
    prompt = [turn("system", "1"), turn("user", "2"), turn("assistant", "3"), turn("user", "4")]
    (batch,) = batches_of(llava, line(["a.png", "b.png"], "5", prompt=prompt))
    words = re.sub("(<image> ?)+", "<image>", words_of(batch["input_ids"][0]))
    assert words == "1 a <image>a a <image>a 2 3 </s> 4 5 </s>"


def test_a_picture_of_16_bits_keeps_its_content(tmp_path):
    values = torch.arange(0, 2**16, 257, dtype=torch.int32).numpy().astype("uint16")[None]
    Image.fromarray(values).save(tmp_path / "deep.png")
    image = open_image(tmp_path / "deep.png")
    assert image.mode == "RGB"
    assert [image.getpixel((i, 0)) for i in range(256)] == [(i, i, i) for i in range(256)]


@pytest.mark.parametrize("mode, color", [("RGBA", (0, 0, 0, 0)), ("LA", (0, 0)), ("P", 0)])
def test_what_is_transparent_becomes_white(mode, color, tmp_path):
    Image.new(mode, (1, 1), color).save(tmp_path / "clear.png", **({"transparency": 0} if mode == "P" else {}))
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


def test_a_photo_of_a_phone_is_opened_without_the_previews_behind_it(tmp_path):
    photo, preview = (Image.new("RGB", (8, 8), color) for color in ("white", "black"))
    photo.save(tmp_path / "photo.mpo", save_all=True, append_images=[preview])
    assert open_image(tmp_path / "photo.mpo").getpixel((0, 0)) == (255, 255, 255)


# 3. Going on, or refusing to
OTHER = {
    "--learning_rate 0.01": "--learning_rate 0.02",
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
    refused = refusal(capsys, llava, "image_lora", "run", *RESUME, *options.format(llava).split())
    assert f"{llava_run} was made with " in refused
    assert OTHER[options] in refused
    assert refused.endswith("; resume it with these")


CHANGED_FILES = {
    "config.json": ('"rms_norm_eps": ', '"rms_norm_eps": 1'),
    "processor_config.json": ("0.48145466", "0.5"),
    "chat_template.jinja": ("</s>", "<s>"),
}


@pytest.mark.parametrize("name", CHANGED_FILES)
def test_a_run_does_not_go_on_with_another_config_or_processor(name, llava, llava_run, capsys):
    changed = shutil.copytree(llava / "base", llava / f"changed_{name}") / name
    before = changed.read_text()
    changed.write_text(before.replace(*CHANGED_FILES[name]))
    assert changed.read_text() != before
    refused = refusal(capsys, llava, "image_lora", "run", *RESUME, "--model", str(changed.parent))
    assert "was made with --model of sha256 " in refused


def test_a_run_goes_on_with_a_copy_of_its_model_in_another_place(llava, llava_run):
    shutil.copytree(llava / "base", llava / "copy")
    stopped(llava_run, llava / "again_copy", after=3)
    tuned(llava, "image_lora", "again_copy", *RESUME, "--model", f"{llava}/copy")
    again, expected = (torch.load(run / "adapter.pt")["layers"] for run in (llava / "again_copy", llava_run))
    torch.testing.assert_close(again, expected, rtol=0, atol=0)


def test_it_goes_on_from_the_last_complete_checkpoint(llava, llava_run, capsys):
    """Also in other places and with other logs; and not from one that was killed while it was written."""
    killed = llava / "killed"
    shutil.copytree(llava_run, killed)
    state = killed / "checkpoint-6" / "trainer_state.json"
    state.write_text(state.read_text()[:-3])
    (killed / "checkpoint-3" / "training_args.bin").unlink()  # only the program that wrote it can read it
    (llava / "moved").mkdir()
    for name in ("train.jsonl", "a.png", "b.png"):
        shutil.copy(llava / name, llava / "moved")
    options = f"--train_file {llava}/moved/train.jsonl --logging_steps 1".split()
    tuned(llava, "image_lora", "killed", *options, *RESUME)
    assert adapter_of(killed) == adapter_of(llava_run)
    for state in killed.glob("checkpoint-*/trainer_state.json"):
        state.unlink()
    refused = refusal(capsys, llava, "image_lora", "killed", *options, *RESUME)
    assert f"no checkpoint in {killed} is complete; start again with a new --output_dir" in refused


def test_nothing_is_overwritten(llava, llava_run, capsys):
    """Neither a model nor another run, and not through a link either."""
    (llava / "link").symlink_to("base")
    for place in ("base", "link", "run"):
        assert "is not empty; choose a new one, or" in refusal(capsys, llava, "image_lora", place)


# 4. What else is refused
KEYS = "a line needs the keys images, prompt and completion, and no others"
LISTS = "images must be a list of paths, prompt and completion lists of turns"
TURN = "a turn needs a role and a content, which are strings, and no more"
ONE_TURN = "a completion must be one turn of the assistant, after one of the user"
BAD_LINES = {
    "no JSON": ("{'images'", "JSONDecodeError"),
    "no object": ("[]", f"{KEYS}; got []"),
    "a key that is missing": ('{"images": [], "prompt": []}', KEYS),
    "a key that would be lost": (line([], tools=[]), KEYS),
    "a key that stands twice": ('{"images": ["a.png"], ' + line([])[1:], "a key stands twice in {'images'"),
    "a string for images": (line("a"), LISTS),
    "a string for messages": (line([], prompt="a"), LISTS),
    "strings for messages": (line([], prompt=["a"]), f"{TURN}; got 'a'"),
    "nothing as an image": (line([None]), LISTS),
    "a list as a role": (line([], prompt=[turn(["user"], "a")]), TURN),
    "half a surrogate pair": (line([], "\ud800"), "can't encode character '\\ud800' in position"),
    "an animation": (line(["animation.gif"]), "animation.gif has several frames or 32 bits a pixel"),
    "an image of floats": (line(["F.tiff"]), "F.tiff has several frames or 32 bits a pixel; save one"),
    "an image of 32 bits": (line(["I.tiff"]), "I.tiff has several frames or 32 bits a pixel; save one"),
    "a turn without a role": (line([], prompt=[{"content": "a"}]), TURN),
    "a key of a turn that would be lost": (line([], prompt=[turn("user", "a") | {"name": "Ada"}]), TURN),
    "parts": (line([], prompt=[turn("user", [{"type": "text", "text": "a"}])]), TURN),
    "a completion of two turns": (line([], completion=[turn("user", "a"), turn("assistant", "a")]), ONE_TURN),
    "a prompt that ends with the assistant": (line([], prompt=[turn("assistant", "a")]), ONE_TURN),
    "no prompt": (line([], prompt=[]), ONE_TURN),
    "an empty answer": (line([], " "), "the completion is empty"),
    "a missing image": (line(["c.png"]), "FileNotFoundError"),
    "a truncated image": (line(["truncated.png"]), "OSError: image file is truncated"),
    "a placeholder in a text": (line([], prompt=[turn("user", "<image>")]), "a text contains the placeholder of an"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_before_training_begins(name, llava, capsys):
    bad, sentence = BAD_LINES[name]
    file = llava / "bad.jsonl"
    file.write_text(f"{line(['a.png'])}\n{bad}\n")
    refused = refusal(capsys, llava, "image_lora", "bad", "--train_file", str(file))
    assert f"{file}, line 2: " in refused
    assert sentence in refused


def test_a_bad_line_of_the_evaluation_file_is_named_as_well_and_workers_find_it(llava, capsys):
    (llava / "bad.jsonl").write_text(f"{line(['a.png'])}\n{line(['truncated.png'])}\n")
    options = f"--eval_file {llava}/bad.jsonl --dataloader_num_workers 2".split()
    refused = refusal(capsys, llava, "image_lora", "bad", *options)
    assert f"{llava}/bad.jsonl, line 2: OSError: image file is truncated" in refused


BAD_OPTIONS = {
    "--train_file {}/text.jsonl": "no example of {}/text.jsonl has an image, as image_lora needs",
    "--train_file {}/text.jsonl --method partial_lora": "has an image, as partial_lora needs",
    "--num_heads 5": "num_heads must be in 1..4, got 5",
    "--num_heads 2 --method lora": "--num_heads is for --method image_lora; leave it out",
    "--max_length 2": "train.jsonl, line 1: ValueError: no token of the completion is left to learn",
    "--early_stopping_patience 2": "--early_stopping_patience needs --eval_file",
    "--resume_from_checkpoint true": "no checkpoint in {}/bad is complete",
    "--model {}/no": "no",
    "--push_to_hub true": "--push_to_hub true is no option of tune.py, which is there to be copied and changed",
    "--lr 1": "--lr 1 is no option of tune.py",  # no abbreviations
}


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_a_bad_option_is_refused_in_a_sentence(options, llava, capsys):
    refused = refusal(capsys, llava, "image_lora", "bad", *options.format(llava).split())
    assert BAD_OPTIONS[options].format(llava) in refused
