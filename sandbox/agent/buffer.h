// A growable run of bytes, consumed at the front. Running out of memory ends the agent: as PID 1 it is the
// last process that the kernel refuses memory.
#pragma once

#include <stddef.h>
#include <stdint.h>

struct buffer {
    uint8_t *data;
    size_t start, end, capacity;
};

static inline size_t buffer_length(const struct buffer *buffer) {
    return buffer->end - buffer->start;
}

uint8_t *buffer_reserve(struct buffer *buffer, size_t size); // returns space for `size` bytes at the end
void buffer_append(struct buffer *buffer, const void *bytes, size_t size);
void buffer_consume(struct buffer *buffer, size_t size);
void buffer_free(struct buffer *buffer);

void *memory_get(size_t size); // zeroed; never NULL
void *memory_resize(void *memory, size_t size);
