#include "loop.h"

#include <errno.h>
#include <stddef.h>
#include <string.h>
#include <unistd.h>

#include "error.h"

void loop_open(struct loop *loop) {
    loop->epoll = epoll_create1(EPOLL_CLOEXEC);
    if (loop->epoll < 0)
        panic("epoll_create1: %s", strerror(errno));
}

void loop_add(struct loop *loop, struct source *source, uint32_t events) {
    struct epoll_event event = {.events = events | EPOLLET, .data.ptr = source};
    if (epoll_ctl(loop->epoll, EPOLL_CTL_ADD, source->fd, &event) < 0)
        panic("epoll_ctl: %s", strerror(errno));
}

void loop_forget(struct loop *loop, struct source *source) {
    if (source->fd < 0)
        return;
    // close(2) is not enough: a child that has not called exec yet holds the same open file (epoll(7))
    epoll_ctl(loop->epoll, EPOLL_CTL_DEL, source->fd, NULL);
    for (int i = loop->at; i < loop->count; i++)
        if (loop->batch[i].data.ptr == source)
            loop->batch[i].data.ptr = NULL;
    source->fd = -1;
}

void loop_close(struct loop *loop, struct source *source) {
    int fd = source->fd;
    loop_forget(loop, source);
    if (fd >= 0)
        close(fd);
}

void loop_turn(struct loop *loop, int timeout_ms) {
    int count = epoll_wait(loop->epoll, loop->batch, LOOP_BATCH, timeout_ms);
    if (count < 0) {
        if (errno != EINTR)
            panic("epoll_wait: %s", strerror(errno));
        return;
    }
    loop->count = count;
    for (loop->at = 0; loop->at < loop->count; loop->at++) {
        struct source *source = loop->batch[loop->at].data.ptr;
        if (source)
            source->ready(source, loop->batch[loop->at].events);
    }
    loop->at = loop->count = 0;
}
