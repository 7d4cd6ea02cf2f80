"""Makes what train.py reads: a byte-level BPE trained on the corpus, and the corpus as tokens.

    python3 scripts/train_tiny/prepare.py --out DIR [--tokens 16000000]

DIR gets the tokenizer files in Hugging Face layout and tokens.xz, little-endian uint16, each document closed
by <|endoftext|>. The same arguments give the same files. Needs numpy and tokenizers.
"""
import argparse
import json
import lzma
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import corpus

VOCAB_SIZE = 2048
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# The splitting rule of the Qwen3 tokenizers, so that what reads those reads this.
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
CHAT_TEMPLATE = ("{%- for message in messages %}"
                 "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
                 "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}")
TOKENIZER_CONFIG = {
    "tokenizer_class": "Qwen2Tokenizer", "model_max_length": 512, "add_prefix_space": False,
    "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None,
    "clean_up_tokenization_spaces": False, "errors": "replace", "split_special_tokens": False,
    "chat_template": CHAT_TEMPLATE,
}
TRAIN_SEED, TOKENIZER_DOCUMENTS = 1, 20000


def train_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    byte_level = {"add_prefix_space": False, "use_regex": False}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(**byte_level)])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False, **byte_level)
    tokenizer.decoder = decoders.ByteLevel(trim_offsets=False, **byte_level)
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE - len(SPECIAL), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(map(plain, islice(corpus.documents(TRAIN_SEED), TOKENIZER_DOCUMENTS)), trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise SystemExit(f"the corpus gave {tokenizer.get_vocab_size()} tokens where {VOCAB_SIZE} were asked for")
    return tokenizer


def plain(text):
    """A document without the marks of the chat format, which must not become part of any merge."""
    for name in SPECIAL:
        text = text.replace(name, "")
    return text


def encode(tokenizer, documents, count):
    """At least `count` tokens of whole documents, then cut to the last document that fits."""
    end = tokenizer.token_to_id(SPECIAL[0])
    parts, total = [], 0
    while total < count:
        for encoding in tokenizer.encode_batch(list(islice(documents, 2000))):
            parts.append(encoding.ids + [end])
            total += len(parts[-1])
    while total > count:
        total -= len(parts.pop())
    return np.concatenate([np.asarray(ids, dtype="<u2") for ids in parts]), len(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=16_000_000)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    tokenizer = train_tokenizer()
    tokenizer.save(str(args.out / "tokenizer.json"))
    (args.out / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=2) + "\n")
    ids, documents = encode(tokenizer, corpus.documents(TRAIN_SEED), args.tokens)
    with lzma.open(args.out / "tokens.xz", "wb", preset=6) as file:
        file.write(ids.tobytes())
    print(f"{documents} documents, {len(ids)} tokens, {(args.out / 'tokens.xz').stat().st_size} bytes packed")


if __name__ == "__main__":
    main()
