// A container's output as CRI log lines, in a buffer addressed by absolute byte offset.
//
//      0 ........ start ............ sent ............ end
//      acknowledged | sent, not yet   | not yet sent |
//                   | acknowledged    |              |
//
// The bytes from start to end are kept across connections. The container's writer blocks once LOG_BOUND
// bytes are kept, unless the host never opened the log: then the oldest are dropped.
//
// A line: "<RFC 3339, nanoseconds, UTC> stdout|stderr F|P <text>\n"; P marks a line that was cut at
// LOG_LINE_MAX bytes and a last line without a newline (kubernetes/cri-api, and containerd's practice).
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
    bool wanted;   // the host has opened it once
    bool finished; // no more bytes will come
};

struct container;
struct stdio_reader;

// Sees a container's output besides the log.
struct observer {
    size_t (*space)(const struct stdio_reader *reader); // bytes of this output that it can take now
    void (*output)(const struct stdio_reader *reader, const uint8_t *bytes, size_t size);
    void (*ended)(struct container *container); // no more output will come
};

// One output of a container: the read end of its stdout or stderr, or a terminal's master.
struct stdio_reader {
    struct source source;
    struct container *container;
    const struct observer *observer;
    const char *name; // "stdout", "stderr"
    bool readable;
    uint8_t *partial; // of a line that has not ended yet
    size_t partial_length;
};

void stdio_reader_open(struct stdio_reader *reader, struct loop *loop, int fd, const char *name);
void stdio_reader_close(struct stdio_reader *reader, struct loop *loop);

// Reads the output and appends it to the log: a bounded amount, as far as the log and the observer have
// space. With `everything`, all that is there, whatever the bounds. Closes the reader at the end of the
// output, and with `everything` also when nothing more is there at the moment.
void log_drain(struct log *log, struct stdio_reader *reader, struct loop *loop, bool everything);

// Starts to send from `offset` on and drops what is before it. Returns the offset at which the log really
// starts.
uint64_t log_open(struct log *log, uint64_t offset, uint32_t stream, uint32_t window);

// The host has written `bytes` more, and grants as much new credit.
void log_acknowledge(struct log *log, uint32_t bytes);

void log_send(struct log *log, struct channel *channel); // as far as credit and space in the channel go

// Whether draining one of the readers, or sending, would do something.
bool log_can_drain(const struct log *log, const struct stdio_reader *readers, int count);
bool log_can_send(const struct log *log, const struct channel *channel);

void log_free(struct log *log);
