/* perk: text to token ids and back, as a Hugging Face tokenizer.json describes it, and chat formats.
 *
 * What is read: BPE of two kinds, with added and special tokens and a post-processor (TemplateProcessing, ByteLevel,
 * Sequence):
 *  - byte-level (Llama 3, Qwen, DeepSeek): pre-tokenizer and decoder ByteLevel;
 *  - SentencePiece's (Llama 2, Mistral, TinyLlama, Gemma): characters, U+2581 for a space, byte_fallback, unk_token,
 *    fuse_unk; decoder Replace or Metaspace, ByteFallback, Fuse, Strip (at the beginning), in this order.
 * Both with the normalizers NFC, NFD, NFKC, NFKD, Prepend, Replace (of a String), Sequence and the pre-tokenizers
 * Split, Digits, Punctuation, Metaspace, Sequence. Anything else is refused by name with PERK_UNSUPPORTED.
 *
 * Text is UTF-8 of any content, NUL bytes included. Ill-formed input is encoded as if every maximal ill-formed
 * sequence were U+FFFD, the way Python's errors="replace" reads it.
 *
 * Character properties are those of the PCRE2 at hand (Unicode 14 with 10.42), normalization that of Hugging Face
 * (Unicode 9).
 *
 * Threads: a perk_tokenizer is immutable once loaded; any number of threads may use one. A perk_text_stream belongs to
 * one thread at a time.
 */
#ifndef PERK_TOKENIZER_H
#define PERK_TOKENIZER_H

#include "perk/base.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct perk_tokenizer perk_tokenizer;

/* Reads `folder`/tokenizer.json and, where there is one, `folder`/tokenizer_config.json (for the names of the
 * beginning-of-sequence and end-of-sequence tokens). */
PERK_API perk_status perk_tokenizer_load(perk_tokenizer **out, const char *folder, perk_error *err);
/* The same from the text of a tokenizer.json; `json` is borrowed for the call. */
PERK_API perk_status perk_tokenizer_load_buffer(perk_tokenizer **out, const char *json, size_t size, perk_error *err);
PERK_API void perk_tokenizer_free(perk_tokenizer *tokenizer);

/* One more than the largest id: what an array indexed by id needs. Ids in between may name no token. */
PERK_API int32_t perk_tokenizer_vocab_size(const perk_tokenizer *tokenizer);
/* The id of a token by its text as tokenizer.json spells it ("<|im_end|>", "\xC4\xA0the"); -1 when there is none. */
PERK_API int32_t perk_tokenizer_token_id(const perk_tokenizer *tokenizer, const char *text);
/* The text of a token as tokenizer.json spells it, NUL-terminated and owned by the tokenizer; NULL when `id` names
 * none. */
PERK_API const char *perk_tokenizer_token_text(const perk_tokenizer *tokenizer, int32_t id);
/* 1 for the ids that decoding with skip_special leaves out, else 0. */
PERK_API int perk_tokenizer_is_special(const perk_tokenizer *tokenizer, int32_t id);
/* The tokens that tokenizer_config.json names bos_token and eos_token; -1 when it names none. Models may end on other
 * tokens as well: generation_config.json has the last word. */
PERK_API int32_t perk_tokenizer_bos_id(const perk_tokenizer *tokenizer);
PERK_API int32_t perk_tokenizer_eos_id(const perk_tokenizer *tokenizer);

typedef struct perk_encode_options {
    int add_special_tokens; /* apply the post-processor's template (a BOS in front, for example) */
    int parse_special;      /* recognise added tokens in the text; 0 takes all of it as plain text (untrusted input) */
} perk_encode_options;

/* NULL options mean {1, 1}, which is what Hugging Face does by default. `*ids` is released with free(); it is never
 * NULL on success, even when `*count` is 0. At most about 700 MB of text a call (PERK_LIMIT). */
PERK_API perk_status perk_tokenizer_encode(const perk_tokenizer *tokenizer, const char *text, size_t size,
                                           const perk_encode_options *options, int32_t **ids, size_t *count,
                                           perk_error *err);

/* `*text` is well-formed UTF-8, NUL-terminated (not counted in `*size`), released with free(). Bytes that are not
 * UTF-8 come out as U+FFFD: one for every maximal ill-formed sequence of a byte-level tokenizer; with byte fallback, a
 * run of byte tokens is text if it is UTF-8 as a whole, and else one U+FFFD for every token of it. Ids that name no
 * token give nothing. */
PERK_API perk_status perk_tokenizer_decode(const perk_tokenizer *tokenizer, const int32_t *ids, size_t count,
                                           int skip_special, char **text, size_t *size, perk_error *err);

/* Decoding one id at a time. Every piece is complete, well-formed UTF-8: bytes of an unfinished character wait for the
 * next id, and with byte fallback a run of byte tokens waits for the token after it. All pieces, the one from finish
 * included, add up to what perk_tokenizer_decode gives for all ids. */
typedef struct perk_text_stream perk_text_stream;

/* `tokenizer` is borrowed until the stream is freed. */
PERK_API perk_status perk_text_stream_new(perk_text_stream **out, const perk_tokenizer *tokenizer, int skip_special,
                                          perk_error *err);
/* `*text` (NUL-terminated; `*size` may be 0) belongs to the stream and is valid until its next call. */
PERK_API perk_status perk_text_stream_push(perk_text_stream *stream, int32_t id, const char **text, size_t *size,
                                           perk_error *err);
/* Ends the text: of what still waits, what is no UTF-8 becomes U+FFFD. The stream is then ready for another text. */
PERK_API perk_status perk_text_stream_finish(perk_text_stream *stream, const char **text, size_t *size,
                                             perk_error *err);
PERK_API void perk_text_stream_free(perk_text_stream *stream);

/* Chat formats, one a model family. */
typedef enum perk_chat_family {
    PERK_CHAT_NONE = 0,
    PERK_CHAT_QWEN3 = 1,    /* <|im_start|>role ... <|im_end|>; roles system, user, assistant, tool */
    PERK_CHAT_LLAMA3 = 2,   /* <|start_header_id|>role<|end_header_id|> ... <|eot_id|>; any role */
    PERK_CHAT_DEEPSEEK = 3, /* User and Assistant in full-width bars; roles system, user, assistant, tool */
    PERK_CHAT_MISTRAL = 4,  /* [INST] ... [/INST] of Mistral 7B v0.3; system first, then user and assistant in turns */
} perk_chat_family;

typedef struct perk_chat_message {
    const char *role;    /* NUL-terminated */
    const char *content; /* NUL-terminated UTF-8 */
} perk_chat_message;

/* The family whose marker tokens the tokenizer has; PERK_CHAT_NONE when it has those of none. */
PERK_API perk_chat_family perk_chat_detect(const perk_tokenizer *tokenizer);

/* Writes the conversation as the model was trained to read it, `*text` released with free(). The text holds the
 * family's special tokens, its BOS included: encode it with add_special_tokens = 0 and parse_special = 1. The content
 * is put in as it is: special tokens spelled out in it will be recognised. With `add_generation_prompt` the text ends
 * where the assistant's answer begins. PERK_UNSUPPORTED when the tokenizer has no known chat format or the family knows
 * no such role. */
PERK_API perk_status perk_chat_format(const perk_tokenizer *tokenizer, const perk_chat_message *messages, size_t count,
                                      int add_generation_prompt, char **text, perk_error *err);
/* The same for a family chosen by the caller. */
PERK_API perk_status perk_chat_format_as(perk_chat_family family, const perk_chat_message *messages, size_t count,
                                         int add_generation_prompt, char **text, perk_error *err);

#ifdef __cplusplus
}
#endif
#endif
