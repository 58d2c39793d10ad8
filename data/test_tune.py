"""tune.py on tiny random models: three methods on two families, in one process and in two, and what it refuses."""

import json
import os
import subprocess
import sys
from itertools import product

import pytest
import torch
from PIL import Image

import imagelora
from data.test_huggingface import GREEDY, PICTURE, ROOT, VIDEO, hf_prompt, tiny_hf_vlm
from test_imagelora import logits_of

transformers = pytest.importorskip("transformers", minversion="5")
for library in ("torchvision", "trl", "datasets"):
    pytest.importorskip(library)
peft, tokenizers = pytest.importorskip("peft"), pytest.importorskip("tokenizers")

from data import tune  # noqa: E402  # it needs these libraries

FAMILIES = pytest.mark.parametrize("family", ["Llava", "Qwen2_5_VL"])
RUNS = list(product(["Llava", "Qwen2_5_VL"], ["image_lora", "lora", "lora_at_visual_tokens"]))
OPTIONS = "--learning_rate 0.02 --num_train_epochs 3 --per_device_train_batch_size 1 --save_steps 6 --logging_steps 4"
OPTIONS += " --use_cpu true --disable_tqdm true"
TEXT = {"input_ids": torch.arange(10, 22)[None]}


# 1. LoRA at visual tokens
def lora(family, restrict=tune.at_visual_tokens):
    """As after training: B is not zero."""
    config = tune.LoraAtVisualTokens(r=4, lora_alpha=8, target_modules=r".*language_model.*\.[qkvo]_proj")
    model = peft.get_peft_model(tiny_hf_vlm(family), config)
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.3)
    return restrict(model)


@FAMILIES
def test_an_update_is_zero_at_text_and_plain_loras_at_visual_tokens(family):
    batch, updates = hf_prompt(family), []
    for restrict in (tune.at_visual_tokens, lambda model: model):
        model = lora(family, restrict)
        for name, module in model.named_modules():
            if ".lora_B." in name:
                module.register_forward_hook(lambda _, args, update: updates.append(update))
        logits_of(model, batch)
    visual = batch["input_ids"] == PICTURE
    restricted, plain = updates[:8], updates[8:]  # q, k, v, o of both layers
    for update in restricted:
        assert not update[~visual].any() and update[visual].any(-1).all()
    for update, free in zip(restricted[:3], plain):  # q, k and v of the first layer have the same input in both models
        torch.testing.assert_close(update[visual], free[visual])


@FAMILIES
def test_neither_checkpointing_nor_a_cache_changes_what_it_computes(family):
    model, batch, gradients = lora(family), hf_prompt(family), []
    cached, whole = (model.generate(**batch, **GREEDY, use_cache=use_cache).logits for use_cache in (True, False))
    torch.testing.assert_close(cached, whole, atol=1e-4, rtol=1e-4)
    for checkpointing in (False, True):
        if checkpointing:
            model.train().gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(**batch).logits.logsumexp(-1).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_embeddings_alone_are_refused_and_so_is_its_folder_by_peft_alone(tmp_path):
    model, batch = lora("Llava"), hf_prompt()
    with pytest.raises(ValueError, match="which tokens are visual"):
        model(inputs_embeds=torch.zeros(1, 3, 32))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="at visual tokens: use load_at_visual_tokens"):
        peft.PeftModel.from_pretrained(tiny_hf_vlm(), tmp_path)
    loaded = tune.load_at_visual_tokens(tiny_hf_vlm(), tmp_path)
    assert torch.equal(logits_of(loaded, batch), logits_of(model, batch))


# 2. The script
def processor_for(family):
    """Knows a few words and numbers."""
    image, marks = "<image>", {"<image>": PICTURE}
    if family == "Qwen2_5_VL":
        image = "<|vision_start|><|image_pad|><|vision_end|>"
        marks = {"<|image_pad|>": PICTURE, "<|video_pad|>": VIDEO, "<|vision_start|>": 92, "<|vision_end|>": 93}
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "a", "cat", *map(str, range(60))])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words | marks, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(marks)})
    template = """{% for m in messages %}{% for c in m['content'] %}{{ c['text'] or 'IMAGE' }} {% endfor %}
        {%- if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}""".replace("IMAGE", image)
    if family == "Qwen2_5_VL":
        sizes = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 64}
        pictures, videos = transformers.Qwen2VLImageProcessor(**sizes), transformers.Qwen2VLVideoProcessor(**sizes)
        return transformers.Qwen2_5_VLProcessor(pictures, tokenizer, videos, chat_template=template)
    pictures = transformers.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    options = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return transformers.LlavaProcessor(pictures, tokenizer, chat_template=template, **options)


def line(images, completion):
    prompt = [{"role": "user", "content": "a cat"}]
    return {"images": images, "prompt": prompt, "completion": [{"role": "assistant", "content": completion}]}


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """For each family a folder with a base, two images, and eight lines with one image, with two, or with none."""
    root = tmp_path_factory.mktemp("tune")
    lines = [line(["page.png"], "7"), line(["page.png", "dog.png"], "cat 3"), line(["dog.png"], "cat"), line([], "a")]
    for family in ("Llava", "Qwen2_5_VL"):
        processor_for(family).save_pretrained(root / family / "base")
        tiny_hf_vlm(family).save_pretrained(root / family / "base")
        for name in ("page.png", "dog.png"):
            pixels = torch.randint(256, (12, 9, 3), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(root / family / name)
        (root / family / "train.jsonl").write_text("\n".join(map(json.dumps, lines * 2)))
    return root


def command(folder, method, out="out", accumulate=2):
    files = f"--model {folder}/base --train_file {folder}/train.jsonl --output_dir {folder}/{out}/{method}"
    return f"{files} --method {method} --gradient_accumulation_steps {accumulate} {OPTIONS}".split()


def weights(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def base_of(folder, dtype=torch.bfloat16):
    return transformers.AutoModelForImageTextToText.from_pretrained(folder / "base", dtype=dtype)


@pytest.fixture(scope="session", params=RUNS, ids=" ".join)
def run(request, root):
    """A family's folder, a method, its trainer after training, and the folder of its result."""
    family, method = request.param
    folder = root / family
    return folder, method, tune.main(command(folder, method)), folder / "out" / method


@pytest.fixture(scope="session")
def two_processes(root):
    """Trains all of RUNS in two processes."""
    commands = [command(root / family, method, out="two", accumulate=1) for family, method in RUNS]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*torchrun, __file__, json.dumps(commands)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_loads_on_a_fresh_base_and_leaves_text_alone_as_it_was(run, dtype):
    """Bit for bit, unless the method is plain LoRA."""
    folder, method, trainer, result = run
    model = base_of(folder, dtype).eval()
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    with torch.no_grad():
        text, before = logits_of(model, TEXT), logits_of(model, batch)
        if method == "image_lora":
            imagelora.load(model, result / "adapter.pt")
        elif method == "lora":
            model = peft.PeftModel.from_pretrained(model, result)
        else:
            model = tune.load_at_visual_tokens(model, result)
        after = logits_of(model, batch)
        assert not torch.equal(after, before)
        assert torch.equal(logits_of(model, TEXT), text) == (method != "lora")
        if dtype == torch.bfloat16:
            assert torch.equal(after, logits_of(trainer.model.eval(), batch))


def test_it_learns_and_a_run_goes_on_from_a_checkpoint_that_holds_the_adapter_alone(run):
    folder, method, trainer, result = run
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    expected = weights(trainer.model)
    size = sum(file.stat().st_size for file in (result / "checkpoint-6").glob("*model.safetensors"))
    assert size < 8 * sum(weight.numel() for weight in expected.values())
    again = tune.main([*command(folder, method), "--resume_from_checkpoint", f"{result}/checkpoint-6"])
    assert again.state.log_history[0]["step"] == 4 and again.state.global_step == 12
    torch.testing.assert_close(weights(again.model), expected, rtol=0, atol=0)


def test_two_processes_train_as_one(run, two_processes):
    """Though one may have an image where the other has none."""
    folder, method, trainer, _ = run
    ranks = [torch.load(folder / "two" / method / f"rank{rank}.pt") for rank in range(2)]
    torch.testing.assert_close(*ranks, rtol=0, atol=0)
    torch.testing.assert_close(ranks[0], weights(trainer.model), rtol=0, atol=1e-3)


# 3. What it refuses
CAT = line([], "cat")
BAD_LINES = [
    ("{'images'", "Expecting property name"),
    ("[]", "expected images, prompt and completion, got"),
    (json.dumps({"messages": []}), "expected images, prompt and completion, got"),
    (json.dumps(CAT | {"images": "page.png"}), "images must be a list of paths"),
    (json.dumps(CAT | {"images": ["nowhere.png"]}), "No such file or directory"),
    (json.dumps(CAT | {"images": ["train.jsonl"]}), "cannot identify image file"),
    (json.dumps(CAT | {"prompt": "a cat"}), "prompt and completion must be lists of messages"),
    (json.dumps(CAT | {"completion": []}), "prompt and completion must be lists of messages"),
]


@pytest.mark.parametrize("bad, sentence", BAD_LINES)
def test_a_bad_line_is_refused_with_its_number_before_the_model_is_loaded(bad, sentence, tmp_path):
    (tmp_path / "train.jsonl").write_text(f"{json.dumps(CAT)}\n{bad}\n")
    with pytest.raises(SystemExit, match=f"^tune.py: .*train.jsonl, line 2: {sentence}.*$"):
        tune.main(command(tmp_path, "lora"))


BAD_OPTIONS = [
    (["--learning_rate", "None"], "invalid float value"),
    (["--method", "dora"], "invalid choice: 'dora'"),
    (["--train_file", "nowhere.jsonl"], "No such file or directory: 'nowhere.jsonl'"),
    (["--resume_from_checkpoint", "nowhere"], "nowhere is not the folder of a complete checkpoint"),
    (["--r", "0"], "r must be an integer in 1..32"),
]


@pytest.mark.parametrize("more, sentence", BAD_OPTIONS)
def test_a_bad_option_is_refused_in_a_sentence(more, sentence, root, capsys):
    with pytest.raises(SystemExit) as refused:
        tune.main([*command(root / "Llava", "image_lora"), *more])
    assert sentence in f"{refused.value} {capsys.readouterr().err}"


def test_a_missing_rate_several_gpus_in_one_process_and_a_quantized_model_are_refused(root, tmp_path, monkeypatch):
    options = command(root / "Llava", "lora")
    with pytest.raises(SystemExit, match="--learning_rate is missing"):
        tune.main([option for option in options if option not in ("--learning_rate", "0.02")])
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="one process has several GPUs"):
        patch.setattr(transformers.TrainingArguments, "n_gpu", 2)
        tune.main(options)
    pytest.importorskip("bitsandbytes")
    four_bits = transformers.BitsAndBytesConfig(load_in_4bit=True)
    load = transformers.AutoModelForImageTextToText.from_pretrained
    load(root / "Llava" / "base", quantization_config=four_bits, device_map={"": "cpu"}).save_pretrained(tmp_path)
    processor_for("Llava").save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="is quantized, and TRL would round"):
        tune.main([*options, "--model", str(tmp_path)])


if __name__ == "__main__":  # one of two processes
    for options in json.loads(sys.argv[1]):
        trainer = tune.main(options)
        torch.save(weights(trainer.model), f"{trainer.args.output_dir}/rank{trainer.args.process_index}.pt")
