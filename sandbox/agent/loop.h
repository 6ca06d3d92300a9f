// The event loop: epoll, always edge-triggered. A source's `ready` only notes what happened; the work
// is done afterwards, as far as credit and room allow, so nothing is ever unsubscribed for want of them.
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

// The object that holds a member.
#define container_of(pointer, type, member) ((type *)((char *)(pointer)-offsetof(type, member)))

void loop_open(struct loop *loop);
void loop_add(struct loop *loop, struct source *source, uint32_t events);

// Takes the source out, with events of it that are still to be handled, and closes its descriptor.
void loop_close(struct loop *loop, struct source *source);

// Waits at most `timeout_ms` (-1: for ever) and calls `ready` for all that happened.
void loop_turn(struct loop *loop, int timeout_ms);
