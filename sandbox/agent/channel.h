// The one connection to the host: what is read goes through the parser, what is written is queued and leaves
// in large pieces. Control frames are always queued; stream data only while there is space, so a host that
// does not read cannot make the queue grow.
#pragma once

#include <stdbool.h>

#include "buffer.h"
#include "frame.h"
#include "loop.h"

struct channel {
    struct loop *loop;
    struct source listener; // unix and vsock; -1: none
    struct source link;
    bool readable, writable;
    bool greeted;          // a Welcome with a common version was sent on this connection
    struct parser *parser; // holds the token
    uint8_t *piece;        // bytes as read; like the parser on pages that a forked child sees as zeros
    struct buffer out;
};

// Prepares the channel; `frame` and `resync` are called with `context`.
void channel_open(struct channel *channel, struct loop *loop, void *context,
                  void (*resync)(void *, const uint8_t *), int (*frame)(void *, const struct frame *));

// Uses an open duplex descriptor from now on, which it owns, and closes the one before.
void channel_link(struct channel *channel, int fd);

// Accepts connections from a listening socket; each replaces the one before.
void channel_listen(struct channel *channel, int fd);

// Hangs up and frees all memory.
void channel_close(struct channel *channel);

void channel_read(struct channel *channel);  // one piece, if there is any
void channel_flush(struct channel *channel); // as much as the link accepts

// Bytes of stream data that may be queued now.
size_t channel_space(const struct channel *channel);

void channel_send(struct channel *channel, enum frame_kind kind, uint32_t stream, const void *payload,
                  size_t length);

// Returns space for a payload, to be filled in place; `channel_commit` then queues a frame with `length`
// bytes of it.
uint8_t *channel_begin(struct channel *channel, size_t length);
void channel_commit(struct channel *channel, enum frame_kind kind, uint32_t stream, size_t length);

// Starts a new connection: drops what is queued and echoes the nonce.
void channel_reset(struct channel *channel, const uint8_t *nonce);
