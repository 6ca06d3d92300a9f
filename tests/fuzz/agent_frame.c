// libFuzzer target for the guest agent's frame parser.
//
// The input is what a host writes, cut into pieces at offsets that the input itself chooses. For any input,
// each frame passed to the callback is valid as frame.h defines it, and none is passed before a nonce.

#include <stdlib.h>
#include <string.h>

#include "frame.h"

struct seen {
    struct parser *parser;
    bool synchronised;
    unsigned sum;
};

static void on_resync(void *context, const uint8_t nonce[TOKEN_SIZE]) {
    struct seen *seen = context;
    seen->synchronised = true;
    seen->sum += nonce[0];
}

static void require(bool holds) {
    if (!holds)
        abort();
}

static int on_frame(void *context, const struct frame *frame) {
    struct seen *seen = context;
    require(seen->synchronised && seen->parser->state == PARSER_FRAMES);
    require(frame->kind >= FRAME_HELLO && frame->kind <= FRAME_RESET);
    require(frame->length <= FRAME_MAX);
    require(frame->kind != FRAME_DATA || frame->length <= DATA_MAX);
    require(frame->kind != FRAME_WINDOW || frame->length == 4);
    for (uint32_t i = 0; i < frame->length; i++) // every byte must be readable
        seen->sum += frame->payload[i];
    return frame->stream == 0xdeadbeef ? FRAME_INVALID : FRAME_HANDLED;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    struct parser parser = {.resync = on_resync, .frame = on_frame};
    struct seen seen = {.parser = &parser};
    parser.context = &seen;
    while (size > 0) {
        size_t piece = 1 + data[0] % 64;
        piece = piece < size ? piece : size;
        uint8_t *copy = malloc(piece); // so that AddressSanitizer finds a read past its end
        memcpy(copy, data, piece);
        parser_feed(&parser, copy, piece);
        free(copy);
        data += piece;
        size -= piece;
    }
    parser_restart(&parser);
    parser_free(&parser);
    return 0;
}
