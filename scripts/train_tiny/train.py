"""Trains examples/tiny, a Qwen3 model of 1.7 million parameters, and writes it in Hugging Face layout.

    python3 scripts/train_tiny/train.py --data DIR --out examples/tiny --minutes 3.5 --device cuda

DIR is what prepare.py made. The learning rate follows the clock, so the run ends after --minutes wherever it
is. Prints the training and the held-out loss (nats a token), and at the end what the saved model writes.
Needs torch, transformers and safetensors; no network.
"""
import argparse
import contextlib
import functools
import json
import lzma
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save as pack
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

MAX_POSITIONS = 512
END_OF_TEXT, IM_END = "<|endoftext|>", "<|im_end|>"
HELD_OUT = 0.01         # of the documents, from the end
WARMUP = 0.02           # of the time
WEIGHT_DECAY, BETAS, CLIP = 0.1, (0.9, 0.95), 1.0
PROMPTS = ("Once upon a time", "<|im_start|>user\nTell me a story about a fox named Pip.<|im_end|>\n"
           "<|im_start|>assistant\n")


def model_config(vocab, end_of_text, im_end):
    """config.json as written: the fields that every reader of Qwen3 folders knows."""
    return {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3",
        "vocab_size": vocab, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "rope_scaling": None,
        "max_position_embeddings": MAX_POSITIONS, "tie_word_embeddings": True,
        "attention_bias": False, "attention_dropout": 0.0, "initializer_range": 0.02,
        "use_sliding_window": False, "sliding_window": None, "max_window_layers": 6, "use_cache": True,
        "bos_token_id": end_of_text, "eos_token_id": im_end, "torch_dtype": "bfloat16",
    }


def generation_config(end_of_text, im_end):
    return {"bos_token_id": end_of_text, "eos_token_id": [im_end, end_of_text], "pad_token_id": end_of_text,
            "do_sample": True, "temperature": 0.7, "top_k": 40, "top_p": 0.95}


class Data:
    """All tokens on the device; batches are windows that begin where a document begins, as prompts do."""

    def __init__(self, folder, end_of_text, context, device):
        with lzma.open(folder / "tokens.xz") as file:
            ids = np.frombuffer(file.read(), dtype="<u2").astype(np.int32)
        starts = np.concatenate([[0], np.flatnonzero(ids == end_of_text) + 1])
        starts = starts[starts < len(ids) - context - 1]
        first_held_out = int(len(starts) * (1 - HELD_OUT))
        # A training window must end before the first held-out document.
        train = starts[starts < starts[first_held_out] - context - 1]
        self.tokens = torch.from_numpy(ids).to(device)
        self.train, self.held_out = (torch.from_numpy(s).to(device) for s in (train, starts[first_held_out:]))
        self.window = torch.arange(context + 1, device=device)

    def batch(self, starts):
        rows = self.tokens[starts[:, None] + self.window].long()
        return rows[:, :-1], rows[:, 1:]

    def random_batch(self, size):
        pick = torch.randint(len(self.train), (size,), device=self.train.device)
        return self.batch(self.train[pick])


def loss_of(model, inputs, targets, precision):
    with precision():
        logits = model(input_ids=inputs, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


@torch.no_grad()
def held_out_loss(model, data, precision, count=128, size=16):
    model.eval()
    pieces = data.held_out[:count].split(size)
    losses = [loss_of(model, *data.batch(piece), precision).item() for piece in pieces]
    model.train()
    return sum(losses) / len(losses)


def make_optimizer(model, rate, device):
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=BETAS, fused=device.type == "cuda")


def schedule(done):
    """Share of the full learning rate after the share `done` of the time: linear warm-up, then a half cosine."""
    if done < WARMUP:
        return (done + 1e-3) / (WARMUP + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (done - WARMUP) / (1 - WARMUP))))


def train(model, data, args, precision):
    optimizer = make_optimizer(model, args.rate, args.device)
    begin, limit, reported, step = time.time(), args.minutes * 60, 0.0, 0
    while (elapsed := time.time() - begin) < limit:
        for group in optimizer.param_groups:
            group["lr"] = args.rate * schedule(elapsed / limit)
        loss = loss_of(model, *data.random_batch(args.batch), precision)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        step += 1
        if step % 20 == 0:
            value = loss.item()     # also keeps the queue of launched work short, so that the clock is honest
            if elapsed - reported >= limit / 20:
                reported = elapsed
                rate = step * args.batch * args.context / elapsed
                print(f"{elapsed:6.0f} s  step {step:6d}  {rate:9.0f} tokens/s  loss {value:.4f}  "
                      f"held out {held_out_loss(model, data, precision):.4f}", flush=True)
    print(f"{step} steps, {step * args.batch * args.context / 1e6:.1f} million tokens")


def save(model, args, config, generation):
    """The weights in bf16; the head is the embedding, so it is not written."""
    args.out.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
             for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    (args.out / "model.safetensors").write_bytes(pack(state, metadata={"format": "pt"}))
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (args.out / name).write_text(json.dumps(content, indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (args.data / name).resolve() != (args.out / name).resolve():
            shutil.copyfile(args.data / name, args.out / name)


def show(args, data):
    """What the folder as saved writes, greedily and sampled, and its held-out loss."""
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    model = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.bfloat16).to(args.device).eval()
    print(f"saved model, bf16, held out {held_out_loss(model, data, contextlib.nullcontext):.4f}")
    for prompt in PROMPTS:
        for sample in (False, True):
            ids = tokenizer(prompt, return_tensors="pt").to(args.device)
            choice = {"do_sample": True} if sample else {"do_sample": False, "temperature": None, "top_k": None,
                                                         "top_p": None}
            out = model.generate(input_ids=ids.input_ids, attention_mask=ids.attention_mask,
                                 max_new_tokens=MAX_POSITIONS - ids.input_ids.shape[1], **choice)
            print(f"---- {'sampled' if sample else 'greedy'}\n{tokenizer.decode(out[0])}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=3.5)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=MAX_POSITIONS)
    parser.add_argument("--rate", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    tokenizer = json.loads((args.data / "tokenizer.json").read_text(encoding="utf-8"))
    special = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    ends = special[END_OF_TEXT], special[IM_END]
    config = model_config(len(tokenizer["model"]["vocab"]) + len(special), *ends)
    data = Data(args.data, ends[0], args.context, args.device)
    model = Qwen3ForCausalLM(Qwen3Config(**config)).to(args.device, torch.float32).train()
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(data.tokens)} tokens on {args.device}")
    mixed = functools.partial(torch.autocast, "cuda", dtype=torch.bfloat16)
    train(model, data, args, mixed if args.device.type == "cuda" else contextlib.nullcontext)
    save(model, args, config, generation_config(*ends))
    show(args, data)


if __name__ == "__main__":
    main()
