/* Error records: status, message, prefix; and messages that stay UTF-8 whatever they quote. */
#include "base.h"
#include "test.h"
#include "tokenizer/utf8.h"

static perk_error err;

static void test_messages(void) {
    CHECK(perk_fail(&err, PERK_IO, "%s: cannot open", "a") == PERK_IO && err.status == PERK_IO);
    CHECK(strcmp(err.message, "a: cannot open") == 0, "%s", err.message);
    CHECK(perk_fail_prefix(&err, PERK_IO, "list %d", 3) == PERK_IO);
    CHECK(strcmp(err.message, "list 3: a: cannot open") == 0, "%s", err.message);
    CHECK(perk_fail(NULL, PERK_LIMIT, "unread") == PERK_LIMIT && perk_fail_prefix(NULL, PERK_LIMIT, "x") == PERK_LIMIT);
}

/* Quoted bytes that are no UTF-8, and characters cut by a precision. */
static void test_quotes(void) {
    perk_fail(&err, PERK_BAD_FORMAT, "\"%s\" is no name", "\xff\xc3(\xe2\x82");
    CHECK(strcmp(err.message, "\"?\?(?\?\" is no name") == 0, "%s", err.message);
    perk_fail(&err, PERK_BAD_FORMAT, "\"%.4s\" is no name", "wör\xe2\x82\xac");
    CHECK(strcmp(err.message, "\"wör\" is no name") == 0, "%s", err.message);
    perk_fail(&err, PERK_BAD_FORMAT, "\"%.5s\" is no name", "wör\xe2\x82\xac");
    CHECK(strcmp(err.message, "\"wör?\" is no name") == 0, "%s", err.message);
}

/* Characters cut by the record's end, first by the message, then by what a prefix pushes out. */
static void test_ends(void) {
    char text[sizeof err.message + 8];
    for (size_t shift = 0; shift < 4; shift++) {
        size_t length = shift;
        memset(text, 'x', shift);
        while (length + 4 < sizeof text) memcpy(text + length, "\xf0\x9f\x99\x82", 4), length += 4;
        text[length] = '\0';
        perk_fail(&err, PERK_BAD_FORMAT, "%s", text);
        CHECK(strlen(err.message) == sizeof err.message - 1 && perk_utf8_valid(err.message, strlen(err.message)));
        perk_fail_prefix(&err, PERK_BAD_FORMAT, "p");
        CHECK(strlen(err.message) == sizeof err.message - 1 && perk_utf8_valid(err.message, strlen(err.message)));
    }
}

int main(void) {
    test_messages();
    test_quotes();
    test_ends();
    return 0;
}
