#include "dial.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stddef.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "agent.h"
#include "scope.h"

static void release(struct dial *dial) {
    struct agent *agent = dial->agent;
    struct dial **link = &agent->dials;
    while (*link != dial)
        link = &(*link)->next;
    *link = dial->next;
    agent->dial_count--;
    loop_close(&agent->loop, &dial->connecting);
    inlet_close(&dial->inlet, agent);
    outlet_close(&dial->outlet, agent);
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
    loop_add(&dial->agent->loop, &dial->connecting, EPOLLOUT); // only now: before, it would count as hung up
    return 0;
}

// The one socket gets a descriptor for each direction, so that each has its own source.
static int split(struct dial *dial, struct error *error) {
    struct loop *loop = &dial->agent->loop;
    dial->inlet.source.fd = fcntl(dial->connecting.fd, F_DUPFD_CLOEXEC, 3);
    dial->outlet.source.fd = fcntl(dial->connecting.fd, F_DUPFD_CLOEXEC, 3);
    if (dial->inlet.source.fd < 0 || dial->outlet.source.fd < 0) {
        fail(error, errno, "connect to port %u", dial->port);
        close_fd(&dial->inlet.source.fd);
        close_fd(&dial->outlet.source.fd);
        return -1;
    }
    loop_close(loop, &dial->connecting);
    loop_add(loop, &dial->inlet.source, EPOLLOUT);
    loop_add(loop, &dial->outlet.source, EPOLLIN | EPOLLRDHUP);
    reply_done(dial->agent, dial->request);
    dial->request = 0;
    inlet_begin(&dial->inlet, &dial->agent->channel);
    return 0;
}

static void give_up(struct dial *dial, struct error *error) {
    if (dial->request)
        reply_failure(dial->agent, dial->request, error);
    release(dial);
}

// What listens on ::1 alone is found second; the first refusal is the one to tell.
static void failed(struct dial *dial, struct error *error) {
    if (dial->v6) {
        give_up(dial, &dial->error);
        return;
    }
    dial->error = *error;
    dial->v6 = true;
    if (begin(dial, error) < 0)
        give_up(dial, &dial->error);
}

static void decide(struct dial *dial) {
    struct error error = {0};
    int reason = 0;
    socklen_t size = sizeof reason;
    if (getsockopt(dial->connecting.fd, SOL_SOCKET, SO_ERROR, &reason, &size) < 0)
        reason = errno;
    if (reason) {
        fail(&error, reason, "connect to port %u", dial->port);
        loop_close(&dial->agent->loop, &dial->connecting);
        failed(dial, &error);
    } else if (split(dial, &error) < 0) {
        give_up(dial, &error);
    }
}

void dial_start(struct agent *agent, uint32_t request, const Dial *message) {
    struct error error = {0};
    bool sane =
        message->port && message->port <= UINT16_MAX && message->to_port_stream && message->from_port_stream;
    if (!sane || agent->dial_count >= DIALS_MAX) {
        fail_about(&error, sane ? EMFILE : EINVAL, "dial", sane ? "connections" : "port or streams");
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
        .inlet = inlet_make(message->to_port_stream),
        .outlet = outlet_make(message->from_port_stream, message->window),
    };
    dial->inlet.socket = true;
    agent->dials = dial;
    agent->dial_count++;
    if (begin(dial, &error) < 0)
        failed(dial, &error);
}

// --------------------------------------------------------------------------------- every turn

int dial_frame(struct agent *agent, const struct frame *frame) {
    for (struct dial *dial = agent->dials; dial; dial = dial->next) {
        int taken = inlet_frame(&dial->inlet, frame);
        if (!taken)
            taken = outlet_frame(&dial->outlet, agent, frame);
        if (taken) {
            dial->hung_up |= frame->kind == FRAME_RESET;
            return taken;
        }
    }
    return 0;
}

static void hang_up(struct dial *dial) {
    struct error error = {0};
    fail_about(&error, ECANCELED, "dial", "connection");
    inlet_refuse(&dial->inlet, dial->agent);
    give_up(dial, &error);
}

static void move(struct dial *dial) {
    inlet_pump(&dial->inlet, dial->agent);
    outlet_pump(&dial->outlet, dial->agent, false, false);
    if (dial->inlet.source.fd < 0 && dial->outlet.source.fd < 0)
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
            decide(dial);
    }
}

bool dial_has_work(const struct agent *agent) {
    for (const struct dial *dial = agent->dials; dial; dial = dial->next)
        if (outlet_has_work(&dial->outlet, &agent->channel, false))
            return true;
    return false;
}

void dial_disconnect(struct agent *agent) {
    for (struct dial *dial = agent->dials, *next; dial; dial = next) {
        next = dial->next;
        release(dial);
    }
}
