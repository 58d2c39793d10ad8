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
from data.test_huggingface import GREEDY, PICTURE, ROOT, TEXT, hf_prompt, processor_for, tiny_hf_vlm
from test_imagelora import logits_of

transformers = pytest.importorskip("transformers", minversion="5")
peft, trl = map(pytest.importorskip, ("peft", "trl"))
from data import tune  # noqa: E402

RUNS = list(product(["Llava", "Qwen2_5_VL"], ["image_lora", "lora", "lora_at_visual_tokens"]))
OPTIONS = "--learning_rate 0.02 --num_train_epochs 3 --per_device_train_batch_size 1 --gradient_accumulation_steps 2"
OPTIONS += " --logging_steps 4 --save_steps 6 --use_cpu true --disable_tqdm true"


def line(images, completion):
    prompt, completion = {"role": "user", "content": "a cat"}, {"role": "assistant", "content": completion}
    return json.dumps({"images": images, "prompt": [prompt], "completion": [completion]})


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """For each family a folder with a base, two images, and eight lines with one image, with two, or with none."""
    root = tmp_path_factory.mktemp("tune")
    lines = [line(["a.png"], "7"), line(["a.png", "b.png"], "cat 3"), line(["b.png"], "cat"), line([], "a")]
    for family in ("Llava", "Qwen2_5_VL"):
        processor_for(family).save_pretrained(root / family / "base")
        tiny_hf_vlm(family).save_pretrained(root / family / "base")
        for name, pixels in zip(("a.png", "b.png"), torch.randint(256, (2, 12, 9, 3), dtype=torch.uint8)):
            Image.fromarray(pixels.numpy()).save(root / family / name)
        (root / family / "train.jsonl").write_text("\n".join(lines * 2))
    return root


def command(folder, method, out, *more):
    files = f"--model {folder}/base --train_file {folder}/train.jsonl --output_dir {folder}/{out}/{method}"
    return [*f"{files} --method {method} {OPTIONS}".split(), *more]


def weights(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="session", params=RUNS, ids=" ".join)
def run(request, root):
    """A family's folder, a method, and its trainer after training."""
    folder, method = root / request.param[0], request.param[1]
    return folder, method, tune.main(command(folder, method, "one"))


@pytest.fixture(scope="session")
def two_processes(root):
    commands = [command(root / family, method, "two", "--gradient_accumulation_steps", "1") for family, method in RUNS]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*torchrun, __file__, json.dumps(commands)], env=environment, check=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_loads_on_a_fresh_base_and_text_alone_stays_the_bases_bit_for_bit(run, dtype):
    """Plain LoRA changes it."""
    folder, method, trainer = run
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder / "base", dtype=dtype)
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    text = logits_of(model, TEXT)
    before = logits_of(model, batch)
    if method == "image_lora":
        imagelora.load(model, folder / "one" / method / "adapter.pt")
    elif method == "lora":
        model = peft.PeftModel.from_pretrained(model, folder / "one" / method)
    else:
        model = tune.load_at_visual_tokens(model, folder / "one" / method)
    after = logits_of(model, batch)
    assert not torch.equal(after, before)
    assert torch.equal(logits_of(model, TEXT), text) == (method != "lora")
    if dtype == torch.bfloat16:
        assert torch.equal(after, logits_of(trainer.model.eval(), batch))


def test_it_learns_and_goes_on_from_a_checkpoint_of_the_adapter_alone_without_gradient_checkpointing_too(run):
    folder, method, trainer = run
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] and trainer.args.gradient_checkpointing
    expected, checkpoint = weights(trainer.model), folder / "one" / method / "checkpoint-6"
    size = sum(file.stat().st_size for file in checkpoint.glob("*model.safetensors"))
    assert size < 8 * sum(weight.numel() for weight in expected.values())
    more = ["--gradient_checkpointing", "false", "--resume_from_checkpoint", str(checkpoint)]
    again = tune.main(command(folder, method, "again", *more))
    torch.testing.assert_close(weights(again.model), expected, rtol=0, atol=0)


def test_two_processes_train_as_one(run, two_processes):
    """Though one may have an image where the other has none."""
    folder, method, trainer = run
    ranks = [torch.load(folder / "two" / method / f"rank{rank}.pt") for rank in range(2)]
    torch.testing.assert_close(*ranks, rtol=0, atol=0)
    torch.testing.assert_close(ranks[0], weights(trainer.model), rtol=0, atol=1e-3)


@pytest.mark.parametrize("family", ["Llava", "Qwen2_5_VL"])
def test_lora_at_visual_tokens_is_lora_there_and_nothing_elsewhere_and_peft_alone_refuses_it(family, tmp_path):
    batch, updates = hf_prompt(family), []
    config = tune.LoraAtVisualTokens(init_lora_weights=False, target_modules=r".*language_model.*\.[qkvo]_proj")
    for restrict in (lambda model: model, tune.at_visual_tokens):
        torch.manual_seed(1)
        model = restrict(peft.get_peft_model(tiny_hf_vlm(family), config))
        cached, whole = (model.generate(**batch, **GREEDY, use_cache=use_cache).logits for use_cache in (True, False))
        torch.testing.assert_close(cached, whole, atol=1e-4, rtol=1e-4)
        for name, module in model.named_modules():
            if ".lora_B." in name:
                module.register_forward_hook(lambda _, args, update: updates.append(update))
        logits_of(model, batch)
    visual = batch["input_ids"] == PICTURE
    plain, restricted = updates[:8], updates[8:]  # q, k, v, o of both layers
    assert not any(update[~visual].any() for update in restricted)
    for free, update in zip(plain[:3], restricted):  # q, k and v of the first layer have the same input in both models
        torch.testing.assert_close(update[visual], free[visual])
    with pytest.raises(ValueError, match="which tokens are visual"):
        model(inputs_embeds=torch.zeros(1, 3, 32))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="at visual tokens: use load_at_visual_tokens"):
        peft.PeftModel.from_pretrained(tiny_hf_vlm(family), tmp_path)


REFUSED = [  # the second line of the file, an option, the sentence
    ("{'images'", [], "line 2, is not like the example in tune.py (JSONDecodeError: "),
    ('{"messages": []}', [], "line 2, is not like the example in tune.py (KeyError: 'images')"),
    ('{"images": [], "prompt": []}', [], "(ValueError: prompt is empty)"),
    (line(["nowhere.png"], "cat"), [], "No such file or directory: "),
    (line([], "cat"), ["--method", "dora"], "invalid choice: 'dora'"),
    (line([], "cat"), ["--resume_from_checkpoint", "no"], "no is not the folder of a complete checkpoint"),
    (line([], "cat"), ["--r", "0"], "r must be an integer in 1..32"),
]


@pytest.mark.parametrize("second, options, sentence", REFUSED)
def test_bad_input_is_refused_in_a_sentence(second, options, sentence, root, tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text(f"{line([], 'cat')}\n{second}\n")
    (tmp_path / "base").symlink_to(root / "Llava" / "base")
    with pytest.raises(SystemExit) as refused:
        tune.main(command(tmp_path, "image_lora", "bad", *options))
    assert sentence in f"{refused.value} {capsys.readouterr().err}"


def test_a_missing_rate_a_quantized_model_and_several_gpus_in_one_process_are_refused(root, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="--learning_rate is missing"):
        tune.main("--method lora --model any --train_file any --use_cpu true".split())
    pytest.importorskip("bitsandbytes")
    four_bits = {"quantization_config": transformers.BitsAndBytesConfig(load_in_4bit=True), "device_map": {"": "cpu"}}
    base = transformers.AutoModelForImageTextToText.from_pretrained(root / "Llava" / "base", **four_bits)
    base.save_pretrained(tmp_path)
    processor_for("Llava").save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="is quantized, and TRL would round"):
        tune.main(command(root / "Llava", "lora", "bad", "--model", str(tmp_path)))
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", 2)
    with pytest.raises(SystemExit, match="one process has several GPUs"):
        tune.main(command(root / "Llava", "lora", "bad"))


if __name__ == "__main__":  # one of two processes
    for options in json.loads(sys.argv[1]):
        trainer = tune.main(options)
        torch.save(weights(trainer.model), f"{trainer.args.output_dir}/rank{trainer.args.process_index}.pt")
