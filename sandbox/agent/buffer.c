#include "buffer.h"

#include <stdlib.h>
#include <string.h>

#include "error.h"

enum { KEPT = 256 * 1024 }; // an empty buffer with a larger capacity is freed

void *memory_get(size_t size) {
    void *memory = calloc(1, size ? size : 1);
    if (!memory)
        panic("out of memory: %zu bytes", size);
    return memory;
}

void *memory_resize(void *memory, size_t size) {
    void *grown = realloc(memory, size ? size : 1);
    if (!grown)
        panic("out of memory: %zu bytes", size);
    return grown;
}

uint8_t *buffer_reserve(struct buffer *buffer, size_t size) {
    if (buffer->capacity - buffer->end >= size)
        return buffer->data + buffer->end;
    size_t length = buffer_length(buffer);
    if (buffer->start >= length && buffer->capacity - length >= size) {
        memcpy(buffer->data, buffer->data + buffer->start, length);
    } else {
        size_t capacity = buffer->capacity ? buffer->capacity : 4096;
        while (capacity - length < size)
            capacity *= 2;
        uint8_t *data = memory_get(capacity);
        if (length)
            memcpy(data, buffer->data + buffer->start, length);
        free(buffer->data);
        buffer->data = data;
        buffer->capacity = capacity;
    }
    buffer->start = 0;
    buffer->end = length;
    return buffer->data + length;
}

void buffer_append(struct buffer *buffer, const void *bytes, size_t size) {
    memcpy(buffer_reserve(buffer, size), bytes, size);
    buffer->end += size;
}

void buffer_consume(struct buffer *buffer, size_t size) {
    buffer->start += size;
    if (buffer->start < buffer->end)
        return;
    buffer->start = buffer->end = 0;
    if (buffer->capacity > KEPT)
        buffer_free(buffer);
}

void buffer_free(struct buffer *buffer) {
    free(buffer->data);
    *buffer = (struct buffer){0};
}
