// The one connection to the host: what comes in goes through the parser, what goes out is queued and
// written in large pieces. Control frames are always taken; stream data only while there is room, so a
// host that does not read bounds what is kept here.
#pragma once

#include <stdbool.h>

#include "buffer.h"
#include "frame.h"
#include "loop.h"

struct channel {
    struct loop *loop;
    struct source listener; // unix and vsock
    struct source link;
    bool readable, writable;
    bool greeted;          // WELCOME was sent on this connection, with our version agreed on
    struct parser *parser; // holds the token
    uint8_t *piece;        // as read; on pages that a forked child sees as zeros, as the parser
    struct buffer out;
};

// Prepares the channel; `frame` and `resync` are called with `context`.
void channel_open(struct channel *channel, struct loop *loop, void *context,
                  void (*resync)(void *, const uint8_t *), int (*frame)(void *, const struct frame *));

// Takes over an open duplex descriptor, in place of the one before.
void channel_link(struct channel *channel, int fd);

// Takes connections from a listening socket; each new one displaces the one before.
void channel_listen(struct channel *channel, int fd);

// Hangs up, and lets go of all memory.
void channel_close(struct channel *channel);

void channel_read(struct channel *channel);  // one piece, if there is any
void channel_flush(struct channel *channel); // as much as the host takes

// Bytes of stream data that may be queued now.
size_t channel_room(const struct channel *channel);

void channel_send(struct channel *channel, enum frame_kind kind, uint32_t stream, const void *payload,
                  size_t length);

// Room for a frame's payload, to be filled in place; then queued with what was really filled in.
uint8_t *channel_begin(struct channel *channel, size_t length);
void channel_commit(struct channel *channel, enum frame_kind kind, uint32_t stream, size_t length);

// Drops what is queued and answers the nonce: the beginning of a conversation.
void channel_reset(struct channel *channel, const uint8_t *nonce);
