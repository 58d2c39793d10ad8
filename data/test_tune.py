"""tune.py: LoRA at visual tokens taken apart; the script on tiny random models, three methods, one process and two."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from PIL import Image
from torch.nn.functional import pad

import imagelora
from data.test_huggingface import GREEDY, PICTURE, VIDEO, hf_prompt, tiny_hf_vlm
from test_imagelora import logits_of, loss_of, slopes

transformers, peft, tokenizers = map(pytest.importorskip, ("transformers", "peft", "tokenizers"))
ROOT = Path(imagelora.__file__).parent
SCRIPT = (ROOT / "data" / "tune.py").read_text()
FAMILIES = pytest.mark.parametrize("family", ["Llava", "Qwen2_5_VL"])

# 1. LoRA at visual tokens
TEXT = {"input_ids": torch.arange(10, 22)[None]}
SEQUENCES = {"input_ids", "attention_mask", "mm_token_type_ids"}
TUNE = {"torch": torch, "dataclass": dataclass, "LoraConfig": peft.LoraConfig, "VISUAL": [PICTURE, VIDEO]}
exec(re.search(r"^@dataclass.*?(?=^def answer)", SCRIPT, re.M | re.S)[0], TUNE)


def lora(family, restrict=TUNE["at_visual_tokens"], dtype=torch.float32):
    """As after training: B is not zero."""
    config = TUNE["AtVisualTokens"](r=4, lora_alpha=8, target_modules=r".*language_model.*\.[qkvo]_proj")
    model = peft.get_peft_model(tiny_hf_vlm(family).to(dtype), config)
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.3)
    restrict(model)
    return model


@FAMILIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_text_alone_is_the_bases_bit_for_bit(family, dtype):
    model, batch = lora(family, dtype=dtype), hf_prompt(family)
    tuned = logits_of(model, TEXT), logits_of(model, batch)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, TEXT), tuned[0]) and not torch.equal(logits_of(model, batch), tuned[1])


@FAMILIES
def test_an_update_is_zero_at_text_and_loras_at_visual_tokens_of_several_images(family):
    batch = hf_prompt(family)
    batch |= {name: batch[name].reshape(1, -1) for name in SEQUENCES & set(batch)}  # both images in one sequence
    visual, found = batch["input_ids"] == PICTURE, []
    for restrict in (TUNE["at_visual_tokens"], lambda model: None):
        for name, module in (model := lora(family, restrict)).named_modules():
            if name.endswith("lora_B.default"):
                module.register_forward_hook(lambda _, args, y: found.append(y))
        logits_of(model, batch)
    ours, theirs = found[:8], found[8:]  # q, k, v, o of both layers
    assert visual.sum() == 8 and len(theirs) == 8
    for y in ours:
        assert not y[~visual].any() and y[visual].any(-1).all()
    for y, free in zip(ours[:3], theirs):  # the first layer's q, k and v have the same input
        torch.testing.assert_close(y[visual], free[visual])


@FAMILIES
def test_checkpointing_changes_no_gradient_though_other_calls_come_between(family):
    """Two losses precede one backward pass, each with its own mask. A copied input, which has none, is refused."""
    model, batch = lora(family), hf_prompt(family)
    elsewhere = batch | {name: batch[name].flip(0) for name in SEQUENCES & set(batch)}  # images of the same shape
    assert not any(gradient.any() for gradient in slopes(model, loss_of(model, TEXT)))
    of_one = slopes(model, loss_of(model, batch))
    of_two = slopes(model, loss_of(model, batch), loss_of(model, elsewhere))
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    one = loss_of(model, batch)
    logits_of(model, TEXT)
    torch.testing.assert_close(slopes(model, one), of_one, atol=1e-5, rtol=1e-4)
    two = loss_of(model, batch), loss_of(model, elsewhere)
    torch.testing.assert_close(slopes(model, *two), of_two, atol=1e-5, rtol=1e-4)
    copied = torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone)  # as activation offloading does
    with copied, pytest.raises(RuntimeError, match="on a copy of its input"):
        loss_of(model, batch).backward()


@FAMILIES
def test_a_cache_and_left_padding_change_no_answer(family):
    model, batch = lora(family), hf_prompt(family)
    padded = batch | {name: pad(batch[name], (3, 0)) for name in SEQUENCES & set(batch)}
    cached, whole = (model.generate(**batch, **GREEDY, use_cache=use_cache).logits for use_cache in (True, False))
    torch.testing.assert_close(cached, whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.generate(**padded, **GREEDY).logits, whole, atol=1e-4, rtol=1e-4)


def test_a_saved_adapter_tells_that_it_is_of_visual_tokens(tmp_path):
    """PEFT alone would adapt all tokens; it warns that it ignores the field that tells what to do."""
    model, batch = lora("Llava"), hf_prompt()
    model.save_pretrained(tmp_path)
    assert "call tune.py's at_visual_tokens(model)" in (tmp_path / "adapter_config.json").read_text()
    with pytest.warns(UserWarning, match="at_visual_tokens"):
        loaded = peft.PeftModel.from_pretrained(tiny_hf_vlm(), tmp_path)
    assert not torch.equal(logits_of(loaded, batch), logits_of(model, batch))
    TUNE["at_visual_tokens"](loaded)
    assert torch.equal(logits_of(loaded, batch), logits_of(model, batch))


# 2. The script
def processor_for(family):
    """A few words and numbers; an image in place of a text that is missing."""
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "a", "cat", *map(str, range(60))])}
    fast, marks, image = transformers.PreTrainedTokenizerFast, {"<image>": PICTURE}, "<image>"
    if family == "Qwen2_5_VL":
        marks = {"<|image_pad|>": PICTURE, "<|video_pad|>": VIDEO, "<|vision_start|>": 92, "<|vision_end|>": 93}
        image = "<|vision_start|><|image_pad|><|vision_end|>"
        if transformers.__version__ < "5":  # whose processor takes no other
            fast = transformers.Qwen2TokenizerFast
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words | marks, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "model_input_names": ["input_ids", "attention_mask"]}
    tokenizer = fast(tokenizer_object=tokenizer, **special)
    tokenizer.add_special_tokens({"additional_special_tokens": list(marks)})
    template = "{% for c in messages[0]['content'] %}{{ c['text'] or 'IMAGE' }} {% endfor %}a:".replace("IMAGE", image)
    if family == "Qwen2_5_VL":
        pytest.importorskip("torchvision")
        sizes = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 64}
        pictures, videos = transformers.Qwen2VLImageProcessor(**sizes), transformers.Qwen2VLVideoProcessor(**sizes)
        return transformers.Qwen2_5_VLProcessor(pictures, tokenizer, videos, chat_template=template)
    pictures = transformers.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    options = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return transformers.LlavaProcessor(pictures, tokenizer, chat_template=template, **options)


RATES = {"image_lora": "0.05", "lora": "0.02", "lora at visual tokens": "0.02"}
CLICK = {"image": "page.jpg", "prompt": "a cat", "answer": "{x:6.4} {y: 3}", "bbox": [5, 2, 8, 5]}
BOTH = {"image": ["page.jpg", "dog.png"], "prompt": "a", "answer": "cat"}
ALONE, ALONE_TOO = ({"image": None, "prompt": prompt, "answer": "cat cat"} for prompt in ("a cat", "a"))
KEEP = {"image": "dog.png", "prompt": "cat a", "answer": "cat", "keep": True}
CHANGES = {'"warmup_steps": 20': '"warmup_steps": 0', "BATCH = 16": "BATCH = 2", "workers=4": "workers=1"}
CHANGES |= {"logging_steps=10": "logging_steps=40", '_tokens": 64': '_tokens": 4'}


def prepare(family, folder, epochs=1, save=4):
    """The script, a model, pictures, lines for 8 steps an epoch. The page lies turned; EXIF tells that it is 12 x 9."""
    script, changes = SCRIPT, CHANGES | {'epochs": 3': f'epochs": {epochs}', "save_steps=100": f"save_steps={save}"}
    for old, new in (changes | {"# NAME, SIZE": "NAME, SIZE"} if family == "Llava" else changes).items():
        assert script.count(old) == 1
        script = script.replace(old, new)
    name = re.findall(r'^NAME, SIZE, POINTS = "(.*?)"', script, re.M)[-1]
    processor_for(family).save_pretrained(folder / name)
    tiny_hf_vlm(family).save_pretrained(folder / name)
    (folder / "tune.py").write_text(script)
    pixels, exif = torch.randint(256, (2, 12, 9, 3), dtype=torch.uint8).numpy(), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels[0]).save(folder / "page.jpg", exif=exif)
    Image.fromarray(pixels[1]).save(folder / "dog.png")
    lines = {"train": [CLICK, ALONE, BOTH, CLICK] * 4, "heldout": [CLICK, BOTH, ALONE, KEEP, ALONE_TOO] * 2}
    for part in lines:
        (folder / f"{part}.jsonl").write_text("\n\n".join(map(json.dumps, lines[part])))


def tune(method):
    """Runs the script here: what it leaves, and what it trained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setenv("METHOD", method)
        patch.setenv("RATE", RATES[method])
        exec(Path("tune.py").read_text(), left := {"__name__": "tune"})
    return left, {name: p.detach() for name, p in left["model"].named_parameters() if p.requires_grad}


@FAMILIES
def test_three_methods_learn_a_click_and_a_killed_run_goes_on(family, tmp_path, monkeypatch, capsys):
    """A click through generate() and back to pixels. Text alone stays where it shall. Checkpoints are of adapters."""
    prepare(family, tmp_path, epochs=12, save=88)
    monkeypatch.chdir(tmp_path)
    for method in RATES:
        left, trained = tune(method)
        run, table = left["OUT"], capsys.readouterr().out.split("|run|")[-1]
        counts = json.loads((run / "metrics.json").read_text())["counts"]
        assert counts["task clicks"] == [2, 2] and counts["task exact"][0] >= 2 and counts["task changed"] == [4, 4]
        assert counts["text changed"] == [4 if method == "lora" else 0, 4]
        assert f"\n|{run.name}|{sum(p.numel() for p in trained.values())} of " in table
        # killed as it wrote its last checkpoint
        first, last = sorted(run.glob("checkpoint-*"))
        assert sum(file.stat().st_size for file in first.glob("*model.*")) < 30_000
        (last / "trainer_state.json").unlink()
        written = (first / "trainer_state.json").stat().st_mtime_ns
        torch.testing.assert_close(tune(method)[1], trained, rtol=0, atol=1e-6)
        assert (first / "trainer_state.json").stat().st_mtime_ns == written
        # on a fresh base it answers the same
        base = transformers.AutoModelForImageTextToText.from_pretrained(left["NAME"], dtype=torch.bfloat16)
        if method == "image_lora":
            imagelora.load(base, run / "adapter.pt")
        else:
            base = peft.PeftModel.from_pretrained(base, run / "adapter")
        if method == "lora at visual tokens":
            left["at_visual_tokens"](base)
        left["model"] = base
        assert left["answer"]() == json.loads((run / "answers.json").read_text())
    assert table.count("\n") == 6 and len(list(Path("runs").glob("frozen-*"))) == 1


def test_two_processes_train_as_one_and_go_on(tmp_path, monkeypatch):
    """Though one may have an image where the other has none."""
    alone, folders = {}, [tmp_path / "Llava", tmp_path / "Qwen2_5_VL"]
    for folder in folders:
        folder.mkdir()
        prepare(folder.name, folder)
        monkeypatch.chdir(folder)
        for method in RATES:
            left, trained = tune(method)
            alone[folder / left["OUT"]] = trained, (left["OUT"] / "answers.json").read_text()
        shutil.move("runs", "alone")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    written = {}
    # transformers 4 loads an optimizer on "cpu:0" if there are two processes, which torch does not know
    for _ in range(2 if transformers.__version__ >= "5" else 1):
        done = subprocess.run([*torchrun, __file__, *folders], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        for run, (trained, answers) in alone.items():
            for rank in range(2):
                theirs = torch.load(run / f"rank{rank}.pt")
                torch.testing.assert_close(theirs, trained, rtol=0, atol=1e-3)
            torch.testing.assert_close(theirs, torch.load(run / "rank0.pt"), rtol=0, atol=0)
            assert (run / "answers.json").read_text() == answers
            time = (run / "checkpoint-4" / "trainer_state.json").stat().st_mtime_ns
            assert written.setdefault(run, time) == time
            (run / "checkpoint-8" / "trainer_state.json").unlink()


def test_marked_numbers_are_scaled_and_clicks_scaled_back(tmp_path, monkeypatch):
    """Qwen sees the page of 12 x 9 pixels in 16 x 8, and of a large picture as much as SIZE says."""
    prepare("Qwen2_5_VL", tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(Path("tune.py").read_text().split("\ntrain, heldout = ")[0], given := {"__name__": "tune"})
    e = CLICK | {"image": ["page.jpg"], "answer": "6, {x:6.4}, {y:3} {x: 12}"}
    for points, said, clicks, misses in [
        ("resized", "6, 9, 3 16", ["9 3", "(9.5, 2.7)", "[8, 2, 10, 4]"], ["6 3", "9", "no"]),
        ("thousand", "6, 533, 333 1000", ["533, 333", '{"point_2d": [533.5, 333]}'], ["667, 333", "9 3"]),
        ("file", "6, 6, 3 12", ["x=6.4 y=3", "5 2"], ["8 3", "-6 3", "6 5"]),
    ]:
        given["POINTS"] = points
        given["scale"].cache_clear()
        assert given["text"](e, "answer") == said
        assert [given["hit"](answer, e) for answer in clicks + misses] == [True] * len(clicks) + [False] * len(misses)
    Image.new("RGB", (2000, 1000)).save("large.png")
    given["POINTS"] = "resized"
    given["processor"] = transformers.AutoProcessor.from_pretrained(given["NAME"], max_pixels=4096)
    assert given["scale"]("large.png") == {"x": 88 / 2000, "y": 40 / 1000}


REFUSED = [  # the file, what is changed in it, the sentence
    ("tune.py", 'epochs": 1', 'epochs": 2', "is of other settings or lines"),
    ("train.jsonl", '"cat"', '"a cat"', "is of other settings or lines"),
    (
        "train.jsonl",
        '"image"',
        '"images"',
        "train.jsonl: a line has image, prompt, answer, maybe bbox",
    ),
    ("heldout.jsonl", '"page.jpg"', "null", "heldout.jsonl: a bbox or a marked number needs an image"),
    ("tune.py", '"METHOD", ', '"NONE", "d" + ', "'dimage_lora'; it can be image_lora, lora, or lora at visual tokens$"),
]


def test_what_would_go_wrong_later_is_refused_at_once_in_a_sentence(tmp_path, monkeypatch):
    prepare("Llava", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", Mock(side_effect=InterruptedError))
    for file, old, new, sentence in REFUSED:
        with pytest.raises(InterruptedError):  # it gets as far as to the model
            tune("lora")
        content = Path(file).read_text()
        Path(file).write_text(content.replace(old, new))
        with pytest.raises(SystemExit, match=sentence):
            tune("lora")
        Path(file).write_text(content)
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", 2)
    with pytest.raises(SystemExit, match="several GPUs of one process were not tried: show it one"):
        tune("lora")


if __name__ == "__main__":  # one of two processes
    for folder in sys.argv[1:]:
        os.chdir(folder)
        for method in RATES:
            left, trained = tune(method)
            torch.save(trained, left["OUT"] / f"rank{left['args'].process_index}.pt")
