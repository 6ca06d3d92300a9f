// The bytes of the channel, and their parser. Pure: no descriptors, no clock; fuzzed on its own.
//
// The host begins each connection with a preamble:
//
//      0               16              32
//      +---------------+---------------+
//      | token         | nonce         |
//      +---------------+---------------+
//
// The first 16 bytes ever read are adopted as this VM's token, and so are those after a Hello that announces
// a snapshot. Wherever the token occurs again, also inside a frame that a dead daemon left half sent,
// everything before it is dropped and the nonce after it is echoed raw. Then both sides send frames,
// little-endian:
//
//      0            4      5          8            12
//      +------------+------+----------+------------+---------------
//      | length     | kind | 0  0  0  | stream     | payload ...
//      +------------+------+----------+------------+---------------
//
// After an invalid frame everything is skipped until the next token.
//
// The host writes a preamble with one call on a fresh connection and no transport splits its first
// 16 bytes, so no frame of a dead daemon is completed with the beginning of a token.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    TOKEN_SIZE = 16,
    FRAME_HEADER = 12,
    FRAME_MAX = 4 * 1024 * 1024,
    DATA_MAX = 64 * 1024,
};

// What a callback returns for a frame. Ignored ones are for streams that have ended. After the last one
// before a snapshot the token is forgotten.
enum { FRAME_INVALID = -1, FRAME_IGNORED, FRAME_HANDLED, FRAME_LAST };

enum frame_kind {
    FRAME_HELLO = 1,
    FRAME_WELCOME,
    FRAME_REQUEST,
    FRAME_REPLY,
    FRAME_EVENT,
    FRAME_DATA,
    FRAME_WINDOW,
    FRAME_CLOSE,
    FRAME_RESET,
};

struct frame {
    uint8_t kind;
    uint32_t stream;
    uint32_t length;
    const uint8_t *payload; // only until the callback returns
};

struct parser {
    enum { PARSER_ADOPT, PARSER_SKIP, PARSER_NONCE, PARSER_FRAMES } state;
    uint8_t token[TOKEN_SIZE];
    uint8_t nonce[TOKEN_SIZE];
    unsigned have;                // bytes of the token or nonce read so far
    unsigned matched;             // bytes at the end of the input that begin a token
    uint8_t fallback[TOKEN_SIZE]; // failure function of the search (Knuth, Morris, Pratt)
    uint8_t header[FRAME_HEADER];
    size_t received; // bytes of header and payload so far
    uint8_t *payload;
    size_t capacity;

    void *context;
    void (*resync)(void *context, const uint8_t nonce[TOKEN_SIZE]);
    int (*frame)(void *context, const struct frame *frame); // returns FRAME_INVALID and so on
};

void parser_feed(struct parser *parser, const uint8_t *bytes, size_t size);

// Starts a new connection: only a preamble can come next.
void parser_restart(struct parser *parser);

// Frees the payload buffer.
void parser_free(struct parser *parser);

void frame_header(uint8_t header[FRAME_HEADER], enum frame_kind kind, uint32_t stream, uint32_t length);
uint32_t read_u32(const uint8_t *bytes);
void write_u32(uint8_t *bytes, uint32_t value);
