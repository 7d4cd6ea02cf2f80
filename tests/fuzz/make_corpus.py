#!/usr/bin/env python3
"""Writes the seeds that the fuzz targets start from, tests/fuzz/corpus/<target>/, and tests/fuzz/tokenizer.json, from the
tests' fixtures. The file names say what a seed is. Needs Python alone; the cubin needs an NVRTC, and without one the
seed that is there stays.
"""
import ctypes
import json
import pathlib
import struct

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FIXTURES = HERE.parent / "fixtures"
MARK = b"\xff"  # between the parts of an input


def seed(target, name, *parts):
    folder = HERE / "corpus" / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(MARK.join(parts))


def compact(value):
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def load(path):
    return json.loads(path.read_text())


# ---- model folders ----


def safetensors(tensors, metadata=None):
    header, data = ({"__metadata__": metadata} if metadata else {}), b""
    for name, dtype, shape, content in tensors:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = compact(header)
    return struct.pack("<Q", len(text)) + text + data


def safetensors_seeds():
    small = [("a", "BF16", [2, 3], bytes(12)), ("b", "F32", [], bytes(4)), ("c", "F16", [0], b"")]
    seed("safetensors", "three", safetensors(small, {"format": "pt"}))
    seed("safetensors", "empty", safetensors([]))
    seed("safetensors", "misaligned", safetensors([("x", "U8", [3], bytes(3)), ("y", "F32", [1], bytes(4))]))
    seed("safetensors", "other_types", safetensors([("q", "F8_E4M3", [4], bytes(4)), ("r", "F4", [2, 1], b"\0")]))
    seed("safetensors", "lfs_pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def index_seeds():
    index = load(FIXTURES / "checkpoints" / "sharded" / "model.safetensors.index.json")
    names = list(index["weight_map"].items())
    seed("index", "whole", compact(index))
    seed("index", "part", compact({"weight_map": dict(names[:4])}))
    seed("index", "wrong_shard", compact({"weight_map": {names[0][0]: names[1][1]}}))
    seed("index", "outside", compact({"weight_map": {"a": "../a"}}))


def config_seeds():
    # device: architecture, workers, shared KB, portable; then tokens, requests, logit rows, page, positions, pages
    choices = [bytes([2, 3, 0, 0, 16, 8, 0, 0, 0, 1] + [0] * 6), bytes([0, 7, 99, 0, 33, 3, 5, 2, 40, 0, 9] + [0] * 5)]
    ignored = ("transformers_version", "dtype", "initializer_range", "use_cache", "model_type", "attention_dropout")
    for file in sorted(FIXTURES.glob("*/*/config.json")):
        config = {key: value for key, value in load(file).items() if key not in ignored}
        family, name = file.parts[-3:-1]
        if family != "checkpoints":
            seed("config", name if family == "qwen3" else f"{family}_{name}", choices[len(name) % 2] + compact(config))


def generation_seeds():
    generation = load(FIXTURES / "checkpoints" / "sharded" / "generation_config.json")
    config = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    seed("generation", "both", compact(generation), compact(config))
    seed("generation", "fallback", b"", compact(config))
    seed("generation", "ranges", compact({"temperature": 0, "top_p": 0.5, "min_p": 1e-3, "top_k": 2147483647,
                                          "repetition_penalty": 1.1, "do_sample": False, "eos_token_id": [1.0, 1]}), b"{}")


# ---- tokenizers ----

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
QWEN_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def split(pattern, behavior, invert=False):
    return {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": invert}


def full_tokenizer():
    """The small fixture with everything around it that a tokenizer may have."""
    tokenizer = load(FIXTURES / "tokenizer_small.json")
    added = [("<|im_start|>", True, {}), ("<|im_end|>", True, {}), ("<|endoftext|>", True, {}), ("<a>", False, {}),
             ("wörd", False, {"single_word": True, "normalized": True}), ("<l>", True, {"lstrip": True}),
             ("<r>", False, {"rstrip": True, "normalized": True}), ("<both>", False, {"lstrip": True, "rstrip": True})]
    tokenizer["added_tokens"] = [{"id": 400 + i, "content": text, "special": special, **flags}
                                 for i, (text, special, flags) in enumerate(added)]
    tokenizer["normalizer"] = {"type": "NFC"}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        split({"Regex": QWEN_PATTERN}, "Isolated"), {"type": "Digits", "individual_digits": True}, BYTE_LEVEL]}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [], "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [402], "tokens": []}}}
    return tokenizer


def tiny_tokenizer(**changes):
    """Nine tokens: a JSON that mutation can find its way in."""
    vocab = {text: i for i, text in enumerate(["a", "b", "c", "Ġ", "1", "ab", "abc", "Ã", "¶"])}
    return {"model": {"type": "BPE", "vocab": vocab, "merges": [["a", "b"], "ab c"]},
            "pre_tokenizer": {"type": "ByteLevel"}, "decoder": {"type": "ByteLevel"}, **changes}


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": [*steps, BYTE_LEVEL]}


def sentencepiece_kinds(special, word):
    """Tokenizers of characters, space marks and bytes."""
    mark = "\u2581"
    texts = ["<unk>", mark, "a", "b", "ab", mark + "ab", "c", mark * 2, "<s>"] + [f"<0x{byte:02X}>" for byte in (0xc3, 0xb6, 10)]
    model = {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True,
             "vocab": {text: i for i, text in enumerate(texts)}, "merges": [["a", "b"], [mark, "ab"], mark + " " + mark]}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": mark}
    metaspace = {"type": "Metaspace", "replacement": mark, "prepend_scheme": "first", "split": False}
    decoders = [{"type": "Replace", "pattern": {"String": mark}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    llama = {"model": model, "decoder": {"type": "Sequence", "decoders": decoders},
             "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": mark}, replace]}}
    added = [special | {"id": 20}, word | {"id": 21}]
    return {
        "llama": llama,
        "metaspace": {**llama, "normalizer": None, "pre_tokenizer": metaspace, "added_tokens": added},
        "metaspace_split": {**llama, "normalizer": {"type": "NFC"}, "decoder": metaspace | {"prepend_scheme": "always"},
                            "pre_tokenizer": metaspace | {"split": True, "prepend_scheme": "always"}},
        "unknown": {**llama, "model": model | {"byte_fallback": False, "fuse_unk": False, "ignore_merges": True}},
    }


def tokenizer_seeds():
    (HERE / "tokenizer.json").write_bytes(compact(full_tokenizer()))
    named = compact({"bos_token": "<s>", "eos_token": {"content": "a"}, "model_max_length": 10**30})
    text = "abc ab  1cö cba".encode()
    special = {"id": 9, "content": "<s>", "special": True}
    word = {"id": 10, "content": "ö", "normalized": True, "single_word": True, "lstrip": True, "rstrip": True}
    template = {"type": "TemplateProcessing", "special_tokens": {"<s>": {"ids": [9]}},
                "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "<s>"}}]}
    patterns = sequence(split({"Regex": QWEN_PATTERN}, "Isolated"), split({"String": "b"}, "Removed"))
    behaviors = sequence(split({"Regex": "c+"}, "MergedWithPrevious"), split({"Regex": "a"}, "MergedWithNext", True),
                         split({"Regex": "[ab]"}, "Contiguous"))
    classes = sequence({"type": "Digits", "individual_digits": True}, {"type": "Punctuation", "behavior": "Isolated"})
    kinds = {
        "bare": tiny_tokenizer(),
        "added": tiny_tokenizer(added_tokens=[special, word], normalizer={"type": "NFD"}),
        "template": tiny_tokenizer(added_tokens=[special], post_processor=template),
        "patterns": tiny_tokenizer(pre_tokenizer=patterns),
        "behaviors": tiny_tokenizer(pre_tokenizer=behaviors),
        "classes": tiny_tokenizer(pre_tokenizer=classes),
        "normalizers": tiny_tokenizer(normalizer={"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "NFC"}]}),
        "chat": tiny_tokenizer(added_tokens=[{"id": 20 + i, "content": text, "special": True} for i, text in
                                             enumerate(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])]),
    }
    kinds |= sentencepiece_kinds(special, word)
    for name, tokenizer in kinds.items():
        seed("tokenizer", name, compact(tokenizer), named, text)


def text_seeds():
    texts = {"plain": "The kernel stays on every processor; they're there. 1234", "spaces": " \t\n  a \r\n\n b   ",
             "marks": "e\u0301 wörd \u1100\u1161\u11a8 \u0344 \ufb01", "special": "<|im_start|>a <l> <r> b<both> wörd<a>",
             "wide": "日本語 🙂‍↔️ \U0010ffff", "letters": "a" * 300}
    for number, (name, text) in enumerate(texts.items()):
        seed("text", name, bytes([12]) + text.encode())
        seed("text", "bare_" + name, bytes([1 if number % 2 else 9]) + text.encode())
    seed("text", "ill_formed", b"\x0d\xf0\x9f\x98 \xed\xa0\x80 \xc0\xaf\xff\xe4\xbd")
    seed("text", "ids", bytes([2]) + struct.pack("<8h", 0, 94, 187, 399, 400, 402, -1, 32767))
    seed("text", "bytes", bytes([19]) + struct.pack("<6h", *range(188, 194)))


# ---- compiled programs ----


def cache_seeds():
    key = bytes(range(16))
    header = b"PERK\xc0\xb1\r\n" + struct.pack("<II", 1, 72) + key + struct.pack("<Q", 5) + bytes(32)
    seed("cache_entry", "raw", b"\0" + key + header + b"cubin")
    seed("cache_entry", "good", b"\1\0" + key + b"a payload")
    seed("cache_entry", "edited", b"\1\2" + key + struct.pack("<HBHB", 40, 1, 75, 128) + b"a payload")
    seed("cache_entry", "name", b"\2" + b"0123456789abcdef" * 2 + b".perk")


SOURCE = b"""extern "C" __global__ void __launch_bounds__(64) k(float *p, int n) {
    __shared__ float s[64];
    float a[8];
    for (int i = 0; i < 8; i++) a[i] = p[i];
    s[threadIdx.x] = a[n & 7];
    __syncthreads();
    p[n] = s[n & 63];
}
"""


def compile_cubin(arch):
    """The cubin of SOURCE; None where there is no NVRTC, or one that does not know the architecture."""
    try:
        nvrtc = ctypes.CDLL("libnvrtc.so")
    except OSError:
        return None
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    options = (ctypes.c_char_p * 1)(b"--gpu-architecture=" + arch)
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), SOURCE, b"k.cu", 0, None, None)
    if nvrtc.nvrtcCompileProgram(program, 1, options) != 0:
        return None
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, cubin)
    return cubin.raw[:size.value]


def cubin_seeds():
    for arch in (b"sm_80", b"sm_90a"):
        cubin = compile_cubin(arch)
        if cubin:
            seed("cubin", arch.decode(), b"k", cubin)
    seed("cubin", "elf", b"k", b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HH", 2, 190) + bytes(44))


# ---- the CLI ----


def request_seeds():
    seed("requests", "logits", b"\0[[1,2,3],[0],[]]")
    seed("requests", "texts", b'\1"a text"\n"\\u00e9 <|im_end|>"\n\n""\n')
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    seed("requests", "chat", b"\2" + compact(chat) + b"\n" + compact(chat[1:2]) + b"\n")
    seed("requests", "ids", b'\3[1,2,400]\n{"ids":[3]}\n')
    seed("requests", "plain_ids", b"\4" + b"1 2, 3\n4")
    prompts = [{"tokens": [1, 2, 3], "max_tokens": 4, "id": 1}, {"messages": chat, "top_k": 5},
               {"prompt": "a", "temperature": 0.7, "top_p": 0.9, "min_p": 0.1, "seed": 4, "ignore_eos": True,
                "stop": ["ab", "\n"]},
               {"tokens": [7, 7], "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": -0.5,
                "logit_bias": {"3": 5, "127": -100}, "stop_tokens": [9, 10], "logprobs": True, "top_logprobs": 2}]
    seed("requests", "prompts", b"\x80" + b"\n".join(compact(line) for line in prompts))


safetensors_seeds()
index_seeds()
config_seeds()
generation_seeds()
tokenizer_seeds()
text_seeds()
cache_seeds()
cubin_seeds()
request_seeds()
