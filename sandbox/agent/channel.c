#include "channel.h"

#include <errno.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <linux/vm_sockets.h> // in kernels before 6.9 it needs <sys/socket.h> first

#include "error.h"

enum {
    READ_SIZE = 64 * 1024,
    QUEUE_MAX = 128 * 1024, // of stream data: more would delay every other stream
};

struct secret {
    struct parser parser;
    uint8_t piece[READ_SIZE];
};

static void link_ready(struct source *source, uint32_t events) {
    struct channel *channel = container_of(source, struct channel, link);
    // a serial port that was hung up stays open: the next daemon will use it
    if (events & (EPOLLIN | EPOLLHUP | EPOLLERR | EPOLLRDHUP))
        channel->readable = true;
    if (events & EPOLLOUT)
        channel->writable = true;
}

// Containers have AF_VSOCK too, and could connect by a loopback transport: only CID 2 is the host (vsock(7)).
static bool is_host(const struct sockaddr_storage *peer) {
    if (peer->ss_family != AF_VSOCK)
        return true;
    return ((const struct sockaddr_vm *)peer)->svm_cid == VMADDR_CID_HOST;
}

static void listener_ready(struct source *source, uint32_t events) {
    (void)events;
    struct channel *channel = container_of(source, struct channel, listener);
    for (;;) {
        struct sockaddr_storage peer = {0};
        socklen_t size = sizeof peer;
        int fd = accept4(source->fd, (struct sockaddr *)&peer, &size, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (fd < 0)
            return;
        if (is_host(&peer))
            channel_link(channel, fd);
        else
            close(fd);
    }
}

void channel_open(struct channel *channel, struct loop *loop, void *context,
                  void (*resync)(void *, const uint8_t *), int (*frame)(void *, const struct frame *)) {
    // a container may read the memory of a child that is entering it: the token must not be there
    struct secret *secret =
        mmap(NULL, sizeof *secret, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (secret == MAP_FAILED || madvise(secret, sizeof *secret, MADV_WIPEONFORK) < 0)
        panic("memory of the channel: %s", strerror(errno));
    *channel = (struct channel){
        .loop = loop,
        .listener = {.fd = -1, .ready = listener_ready},
        .link = {.fd = -1, .ready = link_ready},
        .parser = &secret->parser,
        .piece = secret->piece,
    };
    *channel->parser = (struct parser){.context = context, .resync = resync, .frame = frame};
}

void channel_link(struct channel *channel, int fd) {
    loop_close(channel->loop, &channel->link);
    channel->link.fd = fd;
    channel->readable = channel->writable = true;
    channel->greeted = false;
    buffer_free(&channel->out);
    parser_restart(channel->parser);
    loop_add(channel->loop, &channel->link, EPOLLIN | EPOLLOUT | EPOLLRDHUP);
}

void channel_listen(struct channel *channel, int fd) {
    channel->listener.fd = fd;
    loop_add(channel->loop, &channel->listener, EPOLLIN);
}

void channel_read(struct channel *channel) {
    if (!channel->readable)
        return;
    ssize_t size = read(channel->link.fd, channel->piece, READ_SIZE);
    if (size <= 0) {
        // EAGAIN, or the host hung up: a socket waits for the next accept, a port for its next edge
        if (size == 0 || errno != EINTR)
            channel->readable = false;
        return;
    }
    parser_feed(channel->parser, channel->piece, (size_t)size);
}

void channel_flush(struct channel *channel) {
    while (channel->writable && buffer_length(&channel->out) > 0) {
        ssize_t written =
            write(channel->link.fd, channel->out.data + channel->out.start, buffer_length(&channel->out));
        if (written > 0)
            buffer_consume(&channel->out, (size_t)written);
        else if (errno != EINTR)
            channel->writable = false;
    }
}

size_t channel_space(const struct channel *channel) {
    size_t queued = buffer_length(&channel->out);
    return channel->greeted && queued < QUEUE_MAX ? QUEUE_MAX - queued : 0;
}

uint8_t *channel_begin(struct channel *channel, size_t length) {
    return buffer_reserve(&channel->out, FRAME_HEADER + length) + FRAME_HEADER;
}

void channel_commit(struct channel *channel, enum frame_kind kind, uint32_t stream, size_t length) {
    frame_header(channel->out.data + channel->out.end, kind, stream, (uint32_t)length);
    channel->out.end += FRAME_HEADER + length;
}

void channel_send(struct channel *channel, enum frame_kind kind, uint32_t stream, const void *payload,
                  size_t length) {
    uint8_t *space = channel_begin(channel, length);
    if (length)
        memcpy(space, payload, length);
    channel_commit(channel, kind, stream, length);
}

void channel_reset(struct channel *channel, const uint8_t *nonce) {
    channel->greeted = false;
    buffer_free(&channel->out);
    buffer_append(&channel->out, nonce, TOKEN_SIZE);
}

void channel_close(struct channel *channel) {
    loop_close(channel->loop, &channel->link);
    loop_close(channel->loop, &channel->listener);
    buffer_free(&channel->out);
    parser_free(channel->parser);
}
