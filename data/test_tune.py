"""tune.py on tiny random models: three methods on two families."""

import json
from itertools import product

import pytest
import torch
from PIL import Image

import imagelora
from data.test_huggingface import PICTURE, TEXT, hf_prompt, processor_for, tiny_hf_vlm
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


@pytest.mark.parametrize("family, method", RUNS)
def test_it_learns_goes_on_and_text_alone_stays_the_bases_bit_for_bit_but_for_plain_lora(family, method, tmp_path):
    a, b = str(tmp_path / "a.png"), str(tmp_path / "b.png")
    for path, pixels in zip((a, b), torch.randint(256, (2, 12, 9, 3), dtype=torch.uint8)):
        Image.fromarray(pixels.numpy()).save(path)
    lines = [line([a], "7"), line([a, b], "cat 3"), line([b], "cat"), line([], "a")]
    (tmp_path / "train.jsonl").write_text("\n".join(lines * 2))
    processor_for(family).save_pretrained(tmp_path / "base")
    tiny_hf_vlm(family).save_pretrained(tmp_path / "base")
    files = f"--model {tmp_path}/base --train_file {tmp_path}/train.jsonl --method {method}"
    trainer = tune.main(f"{files} --output_dir {tmp_path}/one {OPTIONS}".split())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]

    checkpoint = f"--resume_from_checkpoint {tmp_path}/one/checkpoint-6"
    again = tune.main(f"{files} --output_dir {tmp_path}/again {OPTIONS} {checkpoint}".split())
    trained = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
    for name, parameter in again.model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, trained[name])

    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    text = logits_of(model, TEXT)
    if method == "image_lora":
        imagelora.load(model, tmp_path / "one" / "adapter.pt")
    else:
        model = peft.PeftModel.from_pretrained(model, tmp_path / "one")
        if method == "lora_at_visual_tokens":
            tune.at_visual_tokens(model)
    assert torch.equal(logits_of(model, TEXT), text) == (method != "lora")
    assert torch.equal(logits_of(model, batch), logits_of(trainer.model.eval(), batch))


@pytest.mark.parametrize("family", ["Llava", "Qwen2_5_VL"])
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
