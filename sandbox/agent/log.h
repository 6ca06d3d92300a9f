// A container's output as CRI log lines, in a buffer addressed by absolute byte offset.
//
//      0 ........ start ............ sent ............ end
//      acknowledged | sent, not yet   | not yet sent |
//                   | acknowledged    |              |
//
// What lies between start and end is kept, over any number of connections. The container's writer
// blocks once LOG_BOUND bytes are kept, unless nobody ever asked for the log: then the oldest go.
//
// A line: "<RFC 3339, nanoseconds, UTC> stdout|stderr F|P <text>\n"; P marks a line cut at LINE_MAX
// bytes and an unended last one (kubernetes/cri-api, and containerd's practice).
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "channel.h"

enum {
    LOG_BOUND = 1024 * 1024,
    LOG_LINE_MAX = 16 * 1024,
    LOG_STAMP = 30, // "2016-10-06T00:17:09.669794202Z"
};

struct log {
    uint8_t *ring; // of `capacity` bytes, a power of two
    size_t capacity;
    uint64_t start, sent, end;
    uint32_t stream; // 0: not being sent
    uint64_t credit;
    bool wanted;   // somebody has asked for it
    bool finished; // no more bytes will come
};

struct container;
struct tap;

// Others that hear what a tap gives, besides the log.
struct tee {
    size_t (*room)(const struct tap *tap); // bytes that the fullest of them takes now
    void (*take)(const struct tap *tap, const uint8_t *bytes, size_t size);
};

// One output of a container: stdout, stderr, or a terminal.
struct tap {
    struct source source;
    struct container *container;
    const struct tee *tee;
    const char *name; // "stdout", "stderr"
    bool readable;
    uint8_t *partial; // of a line that has not ended yet
    size_t partial_length;
};

void tap_open(struct tap *tap, struct loop *loop, int fd, const char *name);
void tap_close(struct tap *tap, struct loop *loop);

// Formats what the tap has to give. Bounded by room and a fair share unless `everything`. Closes the
// tap at its end, and with `everything` also when nothing is left for the moment.
void log_drain(struct log *log, struct tap *tap, struct loop *loop, bool everything);

// Begins to send from `offset` on: returns where it really starts. What is before it is forgotten.
uint64_t log_open(struct log *log, uint64_t offset, uint32_t stream, uint32_t window);

// The host has written `bytes` more and gives as much new credit.
void log_acknowledge(struct log *log, uint32_t bytes);

void log_send(struct log *log, struct channel *channel); // as far as credit and room go
bool log_has_work(const struct log *log, const struct tap *taps, int count);
void log_free(struct log *log);
