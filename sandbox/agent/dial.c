#include "dial.h"

#include <errno.h>
#include <netinet/in.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "connection.h"
#include "reply.h"

static void release(struct dial *dial) {
    struct agent *agent = dial->agent;
    struct dial **link = &agent->dials;
    while (*link != dial)
        link = &(*link)->next;
    *link = dial->next;
    loop_close(&agent->loop, &dial->connecting);
    free(dial);
}

// --------------------------------------------------------------------------------- connecting

static void connecting_ready(struct source *source, uint32_t events) {
    (void)events;
    container_of(source, struct dial, connecting)->decided = true;
}

static int connect_to_loopback(int fd, bool v6, uint16_t port) {
    struct sockaddr_in four = {
        .sin_family = AF_INET, .sin_port = htons(port), .sin_addr = {htonl(INADDR_LOOPBACK)}};
    struct sockaddr_in6 six = {
        .sin6_family = AF_INET6, .sin6_port = htons(port), .sin6_addr = IN6ADDR_LOOPBACK_INIT};
    if (v6)
        return connect(fd, (const struct sockaddr *)&six, sizeof six);
    return connect(fd, (const struct sockaddr *)&four, sizeof four);
}

static int begin(struct dial *dial, struct error *error) {
    int fd = socket(dial->v6 ? AF_INET6 : AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return fail(error, errno, "socket");
    if (connect_to_loopback(fd, dial->v6, dial->port) < 0 && errno != EINPROGRESS) {
        fail(error, errno, "connect to port %u", dial->port);
        close(fd);
        return -1;
    }
    dial->connecting.fd = fd;
    dial->decided = false;
    // not before connect(2): an unconnected socket is reported as hung up
    loop_add(&dial->agent->loop, &dial->connecting, EPOLLOUT);
    return 0;
}

static void abandon(struct dial *dial, struct error *error) {
    reply_failure(dial->agent, dial->request, error);
    release(dial);
}

static void connected(struct dial *dial, struct error *error) {
    struct agent *agent = dial->agent;
    int fd = dial->connecting.fd;
    loop_forget(&agent->loop, &dial->connecting);
    struct connection *connection =
        connection_open(agent, fd, dial->to_port, dial->from_port, dial->window, error);
    if (!connection) {
        abandon(dial, error);
        return;
    }
    reply_done(agent, dial->request);
    connection->whole = true;
    connection_begin(connection);
    release(dial);
}

// Tries ::1 after 127.0.0.1; if both fail, the error of 127.0.0.1 is reported.
static void try_next(struct dial *dial, struct error *error) {
    if (dial->v6) {
        abandon(dial, &dial->error);
        return;
    }
    dial->error = *error;
    dial->v6 = true;
    if (begin(dial, error) < 0)
        abandon(dial, &dial->error);
}

static void finish_connect(struct dial *dial) {
    struct error error = {0};
    int reason = 0;
    socklen_t size = sizeof reason;
    if (getsockopt(dial->connecting.fd, SOL_SOCKET, SO_ERROR, &reason, &size) < 0)
        reason = errno;
    if (reason) {
        fail(&error, reason, "connect to port %u", dial->port);
        loop_close(&dial->agent->loop, &dial->connecting);
        try_next(dial, &error);
    } else {
        connected(dial, &error);
    }
}

static int count_dialled(const struct agent *agent) {
    int count = 0;
    for (const struct dial *dial = agent->dials; dial; dial = dial->next)
        count++;
    for (const struct connection *connection = agent->connections; connection; connection = connection->next)
        count += connection->whole;
    return count;
}

void dial_start(struct agent *agent, uint32_t request, const Dial *message) {
    struct error error = {0};
    bool valid =
        message->port && message->port <= UINT16_MAX && message->to_port_stream && message->from_port_stream;
    if (!valid || count_dialled(agent) >= DIALS_MAX) {
        fail_about(&error, valid ? EMFILE : EINVAL, "dial",
                   valid ? "too many connections" : "port or streams");
        reply_failure(agent, request, &error);
        return;
    }
    struct dial *dial = memory_get(sizeof *dial);
    *dial = (struct dial){
        .agent = agent,
        .next = agent->dials,
        .request = request,
        .port = (uint16_t)message->port,
        .connecting = {.fd = -1, .ready = connecting_ready},
        .to_port = message->to_port_stream,
        .from_port = message->from_port_stream,
        .window = message->window,
    };
    agent->dials = dial;
    if (begin(dial, &error) < 0)
        try_next(dial, &error);
}

// --------------------------------------------------------------------------------- every turn

int dial_frame(struct agent *agent, const struct frame *frame) {
    for (struct dial *dial = agent->dials; dial; dial = dial->next) {
        if (frame->stream == dial->to_port) // there is no credit yet
            return frame->kind == FRAME_DATA ? FRAME_INVALID : FRAME_HANDLED;
        if (frame->stream != dial->from_port)
            continue;
        if (frame->kind == FRAME_WINDOW)
            dial->window += read_u32(frame->payload);
        dial->hung_up |= frame->kind == FRAME_RESET;
        return FRAME_HANDLED;
    }
    return 0;
}

static void hang_up(struct dial *dial) {
    struct error error = {0};
    fail_about(&error, ECANCELED, "dial", "connection");
    channel_send(&dial->agent->channel, FRAME_RESET, dial->to_port, NULL, 0);
    channel_send(&dial->agent->channel, FRAME_CLOSE, dial->from_port, NULL, 0);
    abandon(dial, &error);
}

void dial_pump(struct agent *agent) {
    for (struct dial *dial = agent->dials, *next; dial; dial = next) {
        next = dial->next;
        if (dial->hung_up)
            hang_up(dial);
        else if (dial->decided)
            finish_connect(dial);
    }
}

void dial_disconnect(struct agent *agent) {
    for (struct dial *dial = agent->dials, *next; dial; dial = next) {
        next = dial->next;
        release(dial);
    }
}
