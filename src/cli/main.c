/* perk, the command line: finds the command and runs it. */
#include "cli.h"

static const perk_cli_command commands[] = {
    {"run", "generate text from a prompt, in a chat, or from token ids",
     "--model DIR --prompt TEXT [options]\n--model DIR --chat [--prompt TEXT] [--system TEXT] [options]\n"
     "--model DIR --tokens 1,2,3 [options]\n--model DIR --prompts FILE.jsonl [options]",
     "Text streams to stdout as it is made. --chat without --prompt reads one turn a line from stdin\n"
     "until its end. With --json stdout gets one JSON object and nothing else:\n"
     "  text, tokens (ids made, the end token included), prompt_tokens (their number), finish\n"
     "  (\"stop\", \"length\" or \"cancelled\"), times (milliseconds), found_tokens (of the prompt, in pages\n"
     "  that others had filled), with --logprobs logprobs, and start (how the start went).\n"
     "--dump-activations writes DIR/index.json and, for every op of one step on the reference backend,\n"
     "its output as float32 .npy; step 0 has the whole prompt, up to 256 tokens.\n"
     "With --prompts every line of FILE is an object with \"prompt\" (text), \"messages\" (a list of {\"role\",\n"
     "\"content\"}) or \"tokens\" (ids), and what differs from the options: max_tokens, temperature, top_k,\n"
     "top_p, min_p, seed, ignore_eos, repetition_penalty, presence_penalty, frequency_penalty, logit_bias\n"
     "({\"id\": bias}), stop_tokens (ids), stop (a string or a list of them), logprobs (true), top_logprobs,\n"
     "id (anything: the answer has it, too).\n"
     "The answers come a line each, in the same order: as with --json without start; or error, and then the\n"
     "exit code is 1. Steps are shared: see --max-batched-requests.\n"
     "--mode: on a GPU every step is a launch (single), or one launch makes all steps until all requests\n"
     "have ended (completion), or the kernel stays and takes requests while it runs (online). Requests\n"
     "that sample make all steps single ones until they have ended.",
     "  perk run --model examples/tiny --prompt \"Once upon a time\"\n"
     "  perk run --model Qwen3-8B --chat --system \"You are terse.\"\n"
     "  perk run --model bench/configs/qwen3-8b --random-weights --tokens 1,2,3 --json\n"
     "  perk run --model Qwen3-8B --prompt Hello --temperature 0.7 --top-p 0.9 --seed 1 --max-tokens 64\n"
     "  perk run --model Qwen3-8B --prompts requests.jsonl --max-tokens 64 > answers.jsonl",
     perk_cli_run},
    {"tokenize", "text to token ids, and back",
     "--model DIR [TEXT]\n--model DIR --decode [IDS]\n--model DIR --jsonl [--decode | --chat] < FILE",
     "Without an argument stdin is read, to its last byte: a newline at its end belongs to the text.\n"
     "  text to ids       one line of ids, separated by spaces\n"
     "  --decode          ids (separated by spaces or commas) to text and a newline\n"
     "  --jsonl           a JSON string a line in, {\"ids\": [...]} a line out\n"
     "  --jsonl --decode  {\"ids\": [...]} or [...] a line in, a JSON string a line out\n"
     "  --jsonl --chat    a list of {\"role\", \"content\"} a line in, {\"ids\": [...], \"text\": ...} a line out,\n"
     "                    ending where the assistant's answer begins",
     "  perk tokenize --model examples/tiny \"Hello, world!\"\n"
     "  perk tokenize --model examples/tiny --decode 17 4 8\n"
     "  jq -c .text corpus.jsonl | perk tokenize --model examples/tiny --jsonl",
     perk_cli_tokenize},
    {"logits", "teacher-forced logits or perplexity of given token ids",
     "--model DIR --ids FILE.json [--out FILE.npy] [--perplexity] [--dump-activations DIR] [options]",
     "FILE.json is a list of lists of ids. FILE.npy gets float32 [all ids, vocabulary]: row by row the\n"
     "logits after each id, the lists one after the other. Perplexity is over all ids that have one\n"
     "before them in their list. --dump-activations as in perk run; a step has a whole list.",
     "  perk logits --model examples/tiny --ids ids.json --out logits.npy --backend reference\n"
     "  perk logits --model Qwen3-0.6B --ids ids.json --perplexity --json",
     perk_cli_logits},
    {"compile", "compile a model's program ahead of time, for any architecture",
     "--model DIR|config.json [--arch ARCH] [--out FILE.cubin] [options]",
     "Needs NVRTC, but no GPU and no driver. The report: milliseconds by phase, registers, shared\n"
     "memory, spills, size.",
     "  perk compile --model Qwen3-8B --arch sm_90a --out qwen3-8b.cubin\n"
     "  perk compile --model bench/configs/qwen3-8b --arch sm_120a --workers 170 --json",
     perk_cli_compile},
    {"plan", "show the graph and the plan made from it",
     "--model DIR|config.json [--arch ARCH] [--json | --source | --html FILE]",
     "Ops, tasks a worker, bytes streamed a worker, the critical path; with --source the CUDA source\n"
     "of the kernel instead, with --html a page that draws all of it, the tasks in their expected\n"
     "times. Needs no GPU.",
     "  perk plan --model examples/tiny\n"
     "  perk plan --model bench/configs/qwen3-8b --max-batched-tokens 1 --html plan.html\n"
     "  perk plan --model bench/configs/qwen3-8b --arch sm_90a --source > kernel.cu",
     perk_cli_plan},
    {"cache", "look after the cache of compiled programs",
     "list [--json]\nverify [--remove]\nprune --max-bytes SIZE\nclear",
     "The folder is PERK_CACHE_DIR, else $XDG_CACHE_HOME/perk, else ~/.cache/perk; folders that are only\n"
     "read come from PERK_CACHE_READONLY. verify fails (exit code 1) when an entry is bad.",
     "  perk cache list\n  perk cache verify --remove\n  perk cache prune --max-bytes 256M", perk_cli_cache},
    {"test-op", "run an op alone, and compare it with the reference executor", "OP [options]\n--all [options]",
     "OP is embed, rmsnorm, linear, silu_mul, gelu_mul, attention, select_rows, argmax, or several folded\n"
     "into each other: mlp (norm, gate and up, silu), gelu_mlp, vocabulary (embed to argmax), decoder (two\n"
     "layers).\n"
     "Numbers that are not given are those of the self-test. Weights and inputs are drawn, and what the\n"
     "op should write is poisoned before. worst is in units of bf16 rounding (include/perk/test.h). A\n"
     "mismatch is exit code 1. Without a GPU the plan is checked, compiled where there is an NVRTC, and its\n"
     "tasks run on the CPU.",
     "  perk test-op linear --rows 8 --in 4096 --out 1024 --bias --residual\n"
     "  perk test-op attention --heads 32 --kv-heads 8 --head-dim 128 --rows 1 --context 2000 --norms\n"
     "  perk test-op --all --portable --json",
     perk_cli_test_op},
    {"doctor", "what works on this machine, and what to do about what does not",
     "[--json] [--require-gpu] [--selftest]",
     "Looks at the CUDA driver, its devices, NVRTC, NCCL and the cubin cache. Lacks are findings, not\n"
     "failures: the exit code is 0 unless --require-gpu asks for more. In the JSON, gpu_ready tells.\n"
     "--selftest also runs every op and a small decoder on every GPU, and fails (exit code 1) where one\n"
     "computes wrong, or where there is none.",
     "  perk doctor\n  perk doctor --selftest\n  perk doctor --json | jq .gpu_ready", perk_cli_doctor},
    {"profile", "when every task of a decode step ran, and of a step of the prompt",
     "--model DIR|config.json [--json FILE] [--html FILE] [options]",
     "Builds a program whose tasks write time stamps, runs it, and prints where the last step's time\n"
     "went, stage by stage, beside the times that perk plan --html expects. The same model runs\n"
     "without stamps, too: the report says what they cost. With --max-batched-tokens above 1, a step\n"
     "of the prompt is in the files as well.",
     "  perk profile --model examples/tiny --json trace.json --html profile.html\n"
     "  perk profile --model bench/configs/qwen3-8b --random-weights --html profile.html",
     perk_cli_profile},
    {"bench", "measure steps, prompts, starts, loading, syncs and a service under load",
     "decode --model DIR|config.json [--batch 1,8,32] [--context 512,16384] [options]\n"
     "prefill --model DIR|config.json [--prompt-tokens N] [--max-batched-tokens N] [options]\n"
     "startup --model DIR|config.json [--runs N] [options]\nload --model DIR [--page-cache] [options]\n"
     "sync [--runs N] [options]\nserve --model DIR|config.json [--rate R] [--duration S] [--trace FILE] [--soak] "
     "[options]",
     "decode: milliseconds a step, beside reading its weights and KV at the bandwidth of the same run.\n"
     "prefill: a prompt from its first step to its last, and the linear layers' TFLOP/s over that time.\n"
     "startup: processes from their start to the first launch, with an empty cache and with a full one.\n"
     "load: the weights of a folder on their way to the device, next to disk and bus. sync: what one\n"
     "counter sync over all workers takes. Times are medians, with the 10th and 90th percentile. The\n"
     "program that is timed is compared with the reference executor in the same run; sync checks that\n"
     "its counters end where they must.\n\n"
     "serve: requests arrive at random (--rate a second, for --duration seconds), or as --trace says, a\n"
     "line {\"arrival_s\": 0.25, \"prompt_tokens\": 40, \"answer_tokens\": 100} each, with \"cancel_after\": N\n"
     "where it is to be cancelled after N tokens. Times are as the requests' owner sees them, from the\n"
     "time of arrival on. It fails when a token is lost or repeated, a page is still held at the end, or\n"
     "one of the --checks answers is not the one that the request gets alone. --mode is that of perk run.",
     "  perk bench decode --model bench/configs/qwen3-8b --random-weights --batch 1,8,32 --json\n"
     "  perk bench prefill --model bench/configs/qwen3-8b --random-weights --max-batched-tokens 64\n"
     "  perk bench startup --model examples/tiny\n"
     "  perk bench sync\n"
     "  perk bench serve --model examples/tiny --backend reference --rate 40 --duration 2",
     perk_cli_bench},
};

static int print_help(FILE *file) {
    fprintf(file,
            "perk %s: a language model as one persistent GPU kernel\n\n"
            "Usage: perk COMMAND [options]\n\nCommands:\n",
            perk_version());
    for (size_t i = 0; i < PERK_COUNT(commands); i++)
        fprintf(file, "  %-10s%s\n", commands[i].name, commands[i].summary);
    fprintf(file, "\n  perk COMMAND --help   options and examples\n  perk --version        the version\n\n"
                  "Exit codes: 0 it worked, 1 it failed (the reason is on stderr), 2 wrong usage.\n");
    return PERK_EXIT_OK;
}

static int unknown_command(const char *name) {
    const char *names[PERK_COUNT(commands)];
    for (size_t i = 0; i < PERK_COUNT(commands); i++) names[i] = commands[i].name;
    const char *near = perk_cli_nearest(name, names, (int)PERK_COUNT(commands));
    if (near)
        perk_cli_error("unknown command \"%s\"; did you mean \"%s\"? perk --help lists them", name, near);
    else
        perk_cli_error("unknown command \"%s\"; perk --help lists them", name);
    return PERK_EXIT_USAGE;
}

int main(int argc, char **argv) {
    if (argc < 2) {
        print_help(stderr);
        return PERK_EXIT_USAGE;
    }
    const char *name = argv[1];
    if (strcmp(name, "--help") == 0 || strcmp(name, "-h") == 0) return perk_cli_finish(print_help(stdout));
    if (strcmp(name, "--version") == 0) {
        printf("perk %s\n", perk_version());
        return perk_cli_finish(PERK_EXIT_OK);
    }
    for (size_t i = 0; i < PERK_COUNT(commands); i++)
        if (strcmp(name, commands[i].name) == 0)
            return perk_cli_finish(commands[i].run(&commands[i], argc - 2, argv + 2));
    return unknown_command(name);
}
