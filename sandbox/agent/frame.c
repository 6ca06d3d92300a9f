#include "frame.h"

#include <stdlib.h>
#include <string.h>

#include "buffer.h"

enum { KEPT = DATA_MAX }; // a larger payload buffer is freed after its frame

uint32_t read_u32(const uint8_t *bytes) {
    return bytes[0] | (uint32_t)bytes[1] << 8 | (uint32_t)bytes[2] << 16 | (uint32_t)bytes[3] << 24;
}

void write_u32(uint8_t *bytes, uint32_t value) {
    for (int i = 0; i < 4; i++)
        bytes[i] = (uint8_t)(value >> (8 * i));
}

void frame_header(uint8_t header[FRAME_HEADER], enum frame_kind kind, uint32_t stream, uint32_t length) {
    write_u32(header, length);
    write_u32(header + 4, kind);
    write_u32(header + 8, stream);
}

static bool is_valid(const struct frame *frame, const uint8_t *header) {
    if (header[5] || header[6] || header[7])
        return false;
    switch (frame->kind) {
    case FRAME_HELLO:
    case FRAME_REQUEST:
        return frame->length <= FRAME_MAX;
    case FRAME_DATA:
        return frame->length <= DATA_MAX;
    case FRAME_WINDOW:
        return frame->length == 4;
    case FRAME_CLOSE:
    case FRAME_RESET:
        return frame->length == 0;
    default:
        return false; // kinds that only a guest sends, and unknown ones
    }
}

static void forget_frame(struct parser *parser) {
    parser->received = 0;
    if (parser->capacity > KEPT)
        parser_free(parser);
}

void parser_free(struct parser *parser) {
    free(parser->payload);
    parser->payload = NULL;
    parser->capacity = 0;
}

void parser_restart(struct parser *parser) {
    forget_frame(parser);
    parser->have = parser->matched = 0;
    if (parser->state != PARSER_ADOPT)
        parser->state = PARSER_SKIP;
}

static void forget_token(struct parser *parser) {
    memset(parser->token, 0, sizeof parser->token);
    memset(parser->nonce, 0, sizeof parser->nonce);
    parser->have = parser->matched = 0;
    parser->state = PARSER_ADOPT;
}

static void prepare_search(struct parser *parser) {
    unsigned length = 0;
    parser->fallback[0] = 0;
    for (unsigned i = 1; i < TOKEN_SIZE; i++) {
        while (length && parser->token[i] != parser->token[length])
            length = parser->fallback[length - 1];
        if (parser->token[i] == parser->token[length])
            length++;
        parser->fallback[i] = (uint8_t)length;
    }
}

// Returns the number of bytes up to the end of the first token; 0: there is none. A partial match at the end
// is remembered, so a token is found across any number of calls.
static size_t find_token(struct parser *parser, const uint8_t *bytes, size_t size) {
    for (size_t i = 0; i < size; i++) {
        if (!parser->matched) {
            const uint8_t *first = memchr(bytes + i, parser->token[0], size - i);
            if (!first)
                return 0;
            i = (size_t)(first - bytes);
        }
        while (parser->matched && bytes[i] != parser->token[parser->matched])
            parser->matched = parser->fallback[parser->matched - 1];
        if (bytes[i] == parser->token[parser->matched])
            parser->matched++;
        if (parser->matched == TOKEN_SIZE) {
            parser->matched = 0;
            return i + 1;
        }
    }
    return 0;
}

// Consumes bytes of one frame, at least one byte; returns how many. Passes a complete frame to the callback.
static size_t consume_frame(struct parser *parser, const uint8_t *bytes, size_t size) {
    size_t used = 0;
    while (parser->received < FRAME_HEADER) {
        if (used == size)
            return used;
        parser->header[parser->received++] = bytes[used++];
    }
    struct frame frame = {
        .kind = parser->header[4],
        .stream = read_u32(parser->header + 8),
        .length = read_u32(parser->header),
    };
    if (!is_valid(&frame, parser->header)) {
        parser->state = PARSER_SKIP;
        forget_frame(parser);
        return used;
    }
    size_t have = parser->received - FRAME_HEADER;
    size_t more = frame.length - have < size - used ? frame.length - have : size - used;
    if (more < frame.length) { // it comes in pieces: collect them
        if (parser->capacity < frame.length) {
            parser->payload = memory_resize(parser->payload, frame.length);
            parser->capacity = frame.length;
        }
        memcpy(parser->payload + have, bytes + used, more);
        frame.payload = parser->payload;
    } else {
        frame.payload = bytes + used;
    }
    parser->received += more;
    used += more;
    if (have + more == frame.length) {
        int result = parser->frame(parser->context, &frame);
        if (result < 0)
            parser->state = PARSER_SKIP;
        else if (result == FRAME_LAST)
            forget_token(parser);
        forget_frame(parser);
    }
    return used;
}

static size_t collect(struct parser *parser, uint8_t *into, const uint8_t *bytes, size_t size) {
    size_t wanted = TOKEN_SIZE - parser->have;
    size_t used = size < wanted ? size : wanted;
    memcpy(into + parser->have, bytes, used);
    parser->have += (unsigned)used;
    return used;
}

static void consume(struct parser *parser, const uint8_t *bytes, size_t size) {
    while (size && parser->state != PARSER_SKIP && parser->state != PARSER_ADOPT) {
        size_t used;
        if (parser->state == PARSER_NONCE) {
            used = collect(parser, parser->nonce, bytes, size);
            if (parser->have == TOKEN_SIZE) {
                parser->state = PARSER_FRAMES;
                parser->resync(parser->context, parser->nonce);
            }
        } else {
            used = consume_frame(parser, bytes, size);
        }
        bytes += used;
        size -= used;
    }
}

void parser_feed(struct parser *parser, const uint8_t *bytes, size_t size) {
    if (parser->state == PARSER_ADOPT) {
        size_t used = collect(parser, parser->token, bytes, size);
        if (parser->have < TOKEN_SIZE)
            return;
        prepare_search(parser);
        parser->state = PARSER_NONCE;
        parser->have = 0;
        bytes += used;
        size -= used;
    }
    for (size_t used; (used = find_token(parser, bytes, size)) > 0; bytes += used, size -= used) {
        forget_frame(parser);
        parser->state = PARSER_NONCE;
        parser->have = 0;
    }
    consume(parser, bytes, size);
}
