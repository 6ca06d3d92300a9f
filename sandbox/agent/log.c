#include "log.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "buffer.h"

enum {
    RING_MIN = 64 * 1024,
    READ_LARGE = 64 * 1024,
    READ_SMALL = 8 * 1024, // near the bound: a read of newlines grows fortyfold
    READS_IN_A_ROW = 4,
    PREFIX = LOG_STAMP + sizeof " stdout F " - 1,
};

static size_t kept(const struct log *log) {
    return (size_t)(log->end - log->start);
}

static void put(struct log *log, const void *bytes, size_t size) {
    size_t at = (size_t)log->end & (log->capacity - 1);
    size_t first = log->capacity - at < size ? log->capacity - at : size;
    if (size) {
        memcpy(log->ring + at, bytes, first);
        memcpy(log->ring, (const uint8_t *)bytes + first, size - first);
    }
    log->end += size;
}

static void copy_out(const struct log *log, uint64_t offset, uint8_t *into, size_t size) {
    size_t at = (size_t)offset & (log->capacity - 1);
    size_t first = log->capacity - at < size ? log->capacity - at : size;
    memcpy(into, log->ring + at, first);
    memcpy(into + first, log->ring, size - first);
}

static void ensure_capacity(struct log *log, size_t size) {
    size_t capacity = log->capacity ? log->capacity : RING_MIN;
    while (capacity - kept(log) < size)
        capacity *= 2;
    if (capacity == log->capacity)
        return;
    uint8_t *ring = memory_get(capacity);
    struct log grown = *log;
    grown.ring = ring;
    grown.capacity = capacity;
    for (uint64_t offset = log->start; offset < log->end;) { // a byte's index depends on the capacity
        size_t from = (size_t)offset & (log->capacity - 1), to = (size_t)offset & (capacity - 1);
        size_t run = (size_t)(log->end - offset);
        run = run < log->capacity - from ? run : log->capacity - from;
        run = run < capacity - to ? run : capacity - to;
        memcpy(ring + to, log->ring + from, run);
        offset += run;
    }
    free(log->ring);
    *log = grown;
}

static void drop_before(struct log *log, uint64_t offset) {
    log->start = offset;
    if (log->sent < offset)
        log->sent = offset;
    if (log->start == log->end && log->capacity > RING_MIN) { // after a burst
        free(log->ring);
        log->ring = NULL;
        log->capacity = 0;
    }
}

// The host has not opened the log yet: drops the older half, up to the end of a line.
static void drop_oldest(struct log *log) {
    uint64_t offset = log->end - LOG_BOUND / 2;
    while (offset < log->end && log->ring[(size_t)offset++ & (log->capacity - 1)] != '\n')
        ;
    drop_before(log, offset);
}

static void add_line(struct log *log, char *prefix, char tag, struct stdio_reader *reader,
                     const uint8_t *text, size_t size) {
    prefix[PREFIX - 2] = tag;
    ensure_capacity(log, PREFIX + reader->partial_length + size + 1);
    put(log, prefix, PREFIX);
    put(log, reader->partial, reader->partial_length);
    put(log, text, size);
    put(log, "\n", 1);
    reader->partial_length = 0;
}

// A line is cut only when it is longer than LOG_LINE_MAX: one of exactly that length stays whole.
static void add(struct log *log, struct stdio_reader *reader, char *prefix, const uint8_t *bytes,
                size_t size) {
    while (size > 0) {
        const uint8_t *newline = memchr(bytes, '\n', size);
        size_t text = newline ? (size_t)(newline - bytes) : size;
        while (reader->partial_length + text > LOG_LINE_MAX) {
            size_t piece = LOG_LINE_MAX - reader->partial_length;
            add_line(log, prefix, 'P', reader, bytes, piece);
            bytes += piece, text -= piece, size -= piece;
        }
        if (newline) {
            add_line(log, prefix, 'F', reader, bytes, text);
            text++;
        } else {
            if (!reader->partial)
                reader->partial = memory_get(LOG_LINE_MAX);
            memcpy(reader->partial + reader->partial_length, bytes, text);
            reader->partial_length += text;
        }
        bytes += text, size -= text;
    }
}

static void make_prefix(char prefix[PREFIX + 1], const char *name) {
    struct timespec now;
    struct tm utc;
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &utc);
    snprintf(prefix, PREFIX + 1, "%04u-%02u-%02uT%02u:%02u:%02u.%09luZ %s F ", (utc.tm_year + 1900u) % 10000,
             (utc.tm_mon + 1u) % 100, (unsigned)utc.tm_mday % 100, (unsigned)utc.tm_hour % 100,
             (unsigned)utc.tm_min % 100, (unsigned)utc.tm_sec % 100, (unsigned long)now.tv_nsec, name);
}

void stdio_reader_open(struct stdio_reader *reader, struct loop *loop, int fd, const char *name) {
    reader->source.fd = fd;
    reader->name = name;
    reader->readable = true;
    loop_add(loop, &reader->source, EPOLLIN);
}

void stdio_reader_close(struct stdio_reader *reader, struct loop *loop) {
    loop_close(loop, &reader->source);
    free(reader->partial);
    reader->partial = NULL;
    reader->partial_length = 0;
}

static void end_reader(struct log *log, struct stdio_reader *reader, struct loop *loop) {
    if (reader->partial_length > 0) {
        char prefix[PREFIX + 1];
        make_prefix(prefix, reader->name);
        add_line(log, prefix, 'P', reader, NULL, 0);
    }
    stdio_reader_close(reader, loop);
}

// Bytes that may be read now; 0: the writer has to wait.
static size_t read_size(const struct log *log, const struct stdio_reader *reader) {
    size_t bytes = kept(log), space = reader->observer->space(reader);
    if (bytes >= LOG_BOUND)
        return 0;
    size_t size = bytes > LOG_BOUND / 2 ? READ_SMALL : READ_LARGE;
    return size < space ? size : space;
}

void log_drain(struct log *log, struct stdio_reader *reader, struct loop *loop, bool everything) {
    static uint8_t piece[READ_LARGE];
    for (int reads = 0;
         reader->source.fd >= 0 && (everything || (reader->readable && reads < READS_IN_A_ROW)); reads++) {
        if (!log->wanted && kept(log) >= LOG_BOUND)
            drop_oldest(log);
        size_t size = everything ? READ_LARGE : read_size(log, reader);
        if (size == 0)
            return;
        ssize_t got = read(reader->source.fd, piece, size);
        if (got > 0) {
            char prefix[PREFIX + 1];
            make_prefix(prefix, reader->name);
            add(log, reader, prefix, piece, (size_t)got);
            reader->observer->output(reader, piece, (size_t)got);
        } else if (got < 0 && errno == EINTR) {
            continue;
        } else if (got < 0 && errno == EAGAIN && !everything) {
            reader->readable = false;
        } else { // the end, which is EIO for a terminal
            end_reader(log, reader, loop);
        }
    }
}

uint64_t log_open(struct log *log, uint64_t offset, uint32_t stream, uint32_t window) {
    offset = offset < log->start ? log->start : offset > log->end ? log->end : offset;
    drop_before(log, offset);
    log->sent = offset;
    log->stream = stream;
    log->credit = window;
    log->wanted = true;
    return offset;
}

void log_acknowledge(struct log *log, uint32_t bytes) {
    log->credit += bytes;
    uint64_t offset = log->start + bytes;
    drop_before(log, offset < log->sent ? offset : log->sent);
}

void log_send(struct log *log, struct channel *channel) {
    while (log->stream) {
        uint64_t size = log->end - log->sent;
        size_t space = channel_space(channel);
        if (size == 0 && log->finished && channel->greeted) {
            channel_send(channel, FRAME_CLOSE, log->stream, NULL, 0);
            log->stream = 0;
            return;
        }
        size = size < log->credit ? size : log->credit;
        size = size < space ? size : space;
        size = size < DATA_MAX ? size : DATA_MAX;
        if (size == 0)
            return;
        copy_out(log, log->sent, channel_begin(channel, (size_t)size), (size_t)size);
        channel_commit(channel, FRAME_DATA, log->stream, (size_t)size);
        log->sent += size;
        log->credit -= size;
    }
}

bool log_can_drain(const struct log *log, const struct stdio_reader *stdio, int count) {
    for (int i = 0; i < count; i++)
        if (stdio[i].source.fd >= 0 && stdio[i].readable && stdio[i].observer->space(&stdio[i]) > 0 &&
            (!log->wanted || kept(log) < LOG_BOUND))
            return true;
    return false;
}

bool log_can_send(const struct log *log, const struct channel *channel) {
    return log->stream && log->sent < log->end && log->credit && channel_space(channel);
}

void log_free(struct log *log) {
    free(log->ring);
    *log = (struct log){0};
}
