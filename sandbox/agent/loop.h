// The event loop: epoll, always edge-triggered. A source's `ready` only records what happened. The work is
// done afterwards, as far as credit and space allow, so no source is ever unsubscribed for lack of them.
#pragma once

#include <stdint.h>
#include <sys/epoll.h>

struct source {
    int fd; // -1: none
    void (*ready)(struct source *source, uint32_t events);
};

enum { LOOP_BATCH = 64 };

struct loop {
    int epoll;
    struct epoll_event batch[LOOP_BATCH];
    int at, count;
};

static inline void *move_back(void *pointer, size_t bytes) {
    return (char *)pointer - bytes;
}

// The object that holds a member.
#define container_of(pointer, type, member) ((type *)move_back(pointer, offsetof(type, member)))

void loop_open(struct loop *loop);
void loop_add(struct loop *loop, struct source *source, uint32_t events);

// Removes the source, with its events that are still to be handled, and closes its descriptor. Idempotent.
void loop_close(struct loop *loop, struct source *source);

// Removes the source as loop_close does, and leaves its descriptor open.
void loop_forget(struct loop *loop, struct source *source);

// Waits at most `timeout_ms` (-1: without a limit) and calls `ready` for everything that happened.
void loop_turn(struct loop *loop, int timeout_ms);
