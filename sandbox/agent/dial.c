#include "dial.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stddef.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "reply.h"
#include "scope.h"

static void release(struct dial *dial) {
    struct agent *agent = dial->agent;
    struct dial **link = &agent->dials;
    while (*link != dial)
        link = &(*link)->next;
    *link = dial->next;
    agent->dial_count--;
    loop_close(&agent->loop, &dial->connecting);
    input_stream_close(&dial->input, agent);
    output_stream_close(&dial->output, agent);
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

// Each direction gets its own descriptor of the socket, and so its own source.
static int split(struct dial *dial, struct error *error) {
    struct loop *loop = &dial->agent->loop;
    dial->input.source.fd = fcntl(dial->connecting.fd, F_DUPFD_CLOEXEC, 3);
    dial->output.source.fd = fcntl(dial->connecting.fd, F_DUPFD_CLOEXEC, 3);
    if (dial->input.source.fd < 0 || dial->output.source.fd < 0) {
        fail(error, errno, "connect to port %u", dial->port);
        close_fd(&dial->input.source.fd);
        close_fd(&dial->output.source.fd);
        return -1;
    }
    loop_close(loop, &dial->connecting);
    loop_add(loop, &dial->input.source, EPOLLOUT);
    loop_add(loop, &dial->output.source, EPOLLIN | EPOLLRDHUP);
    reply_done(dial->agent, dial->request);
    dial->request = 0;
    input_stream_begin(&dial->input, &dial->agent->channel);
    return 0;
}

static void abandon(struct dial *dial, struct error *error) {
    if (dial->request)
        reply_failure(dial->agent, dial->request, error);
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
    } else if (split(dial, &error) < 0) {
        abandon(dial, &error);
    }
}

void dial_start(struct agent *agent, uint32_t request, const Dial *message) {
    struct error error = {0};
    bool valid =
        message->port && message->port <= UINT16_MAX && message->to_port_stream && message->from_port_stream;
    if (!valid || agent->dial_count >= DIALS_MAX) {
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
        .input = input_stream_make(message->to_port_stream),
        .output = output_stream_make(message->from_port_stream, message->window),
    };
    dial->input.socket = true;
    agent->dials = dial;
    agent->dial_count++;
    if (begin(dial, &error) < 0)
        try_next(dial, &error);
}

// --------------------------------------------------------------------------------- every turn

int dial_frame(struct agent *agent, const struct frame *frame) {
    for (struct dial *dial = agent->dials; dial; dial = dial->next) {
        int handled = input_stream_frame(&dial->input, frame);
        if (!handled)
            handled = output_stream_frame(&dial->output, agent, frame);
        if (handled) {
            dial->hung_up |= frame->kind == FRAME_RESET;
            return handled;
        }
    }
    return 0;
}

static void hang_up(struct dial *dial) {
    struct error error = {0};
    fail_about(&error, ECANCELED, "dial", "connection");
    input_stream_refuse(&dial->input, dial->agent);
    abandon(dial, &error);
}

static void move(struct dial *dial) {
    input_stream_pump(&dial->input, dial->agent);
    output_stream_pump(&dial->output, dial->agent, false, false);
    if (dial->input.source.fd < 0 && dial->output.source.fd < 0)
        release(dial);
}

void dial_pump(struct agent *agent) {
    for (struct dial *dial = agent->dials, *next; dial; dial = next) {
        next = dial->next;
        if (dial->hung_up)
            hang_up(dial);
        else if (dial->connecting.fd < 0)
            move(dial);
        else if (dial->decided)
            finish_connect(dial);
    }
}

bool dial_has_work(const struct agent *agent) {
    for (const struct dial *dial = agent->dials; dial; dial = dial->next)
        if (output_stream_has_work(&dial->output, &agent->channel, false))
            return true;
    return false;
}

void dial_disconnect(struct agent *agent) {
    for (struct dial *dial = agent->dials, *next; dial; dial = next) {
        next = dial->next;
        release(dial);
    }
}
