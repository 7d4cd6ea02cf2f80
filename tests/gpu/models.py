"""Random models of the shapes, as transformers holds them and as model folders.

Weights are N(0, 1 / sqrt(fan in)), norm weights 1 + 0.1 N, biases 0.1 N: activations keep their size from layer to
layer, so that every layer counts in the logits.
"""
import concurrent.futures
import json

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

SHARD_BYTES = 2 << 30


def empty_model(folder, device):
    """The transformers model of `folder`'s config.json, in bf16 on `device`, its weights still to be drawn."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    return model.eval()


@torch.no_grad()
def draw(model, seed):
    for index, (name, weight) in enumerate(model.named_parameters()):
        generator = torch.Generator(weight.device).manual_seed(seed * 100003 + index)
        if name.endswith(".bias"):
            weight.normal_(0, 0.1, generator=generator)
        elif weight.dim() == 1:
            weight.normal_(1, 0.1, generator=generator)
        else:
            weight.normal_(0, weight.shape[-1] ** -0.5, generator=generator)


def as_stored(model):
    """Names and weights as Hugging Face stores them: transformers holds all experts of a layer in one tensor."""
    for name, weight in model.named_parameters():
        if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            yield name, weight
            continue
        prefix, part = name.rsplit(".", 1)
        for expert, matrix in enumerate(weight):
            halves = matrix.chunk(2) if part == "gate_up_proj" else (matrix,)
            for half, stored in zip(halves, ("gate_proj", "up_proj") if len(halves) == 2 else ("down_proj",)):
                yield f"{prefix}.{expert}.{stored}.weight", half


def save(model, folder):
    """Writes the weights as Hugging Face shards them, several files at a time."""
    shards, size = [{}], 0
    for name, weight in as_stored(model):
        if size + weight.nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = weight
        size += weight.nbytes
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]

    def write(name, shard):
        save_file({key: weight.detach().cpu().contiguous() for key, weight in shard.items()}, folder / name)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(write, names, shards))
    if len(shards) > 1:
        places = {key: name for name, shard in zip(names, shards) for key in shard}
        total = sum(weight.nbytes for shard in shards for weight in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
