#include "request.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "agent.h"
#include "attach.h"
#include "cgroup_requests.h"
#include "clock.h"
#include "configure.h"
#include "connection.h"
#include "container.h"
#include "derived.h"
#include "dial.h"
#include "disks.h"
#include "exec.h"
#include "exports.h"
#include "hello.h"
#include "huge.h"
#include "inodes.h"
#include "live.h"
#include "refresh.h"
#include "reply.h"
#include "sockets.h"

// ----------------------------------------------------------------- requests answered at once

static int ping(struct agent *agent, const Request *request, struct error *error) {
    (void)agent, (void)request, (void)error;
    return 0;
}

static int power_off(struct agent *agent, const Request *request, struct error *error) {
    (void)request, (void)error;
    agent->stopping = true;
    return 0;
}

static int prepare(struct agent *agent, const Request *request, struct error *error) {
    return prepare_vm(agent, request->prepare, error);
}

static int bring_cpus_online(struct agent *agent, const Request *request, struct error *error) {
    derived_follow(agent); // the host has added memory before
    return online_cpus(agent, request->online_cpus->count, error);
}

static int reserve_huge_pages(struct agent *agent, const Request *request, struct error *error) {
    return huge_pages(agent, request->huge_pages, error);
}

static int release_inodes(struct agent *agent, const Request *request, struct error *error) {
    (void)request;
    return inodes_release(agent, error);
}

static int refresh_cached_names(struct agent *agent, const Request *request, struct error *error) {
    return refresh_names(agent, request->refresh_names, error);
}

static int refresh_cached_file(struct agent *agent, const Request *request, struct error *error) {
    return refresh_file(agent, request->refresh_file, error);
}

static int configure(struct agent *agent, const Request *request, struct error *error) {
    return configure_pod(agent, request->configure, error);
}

static int send_signal(struct agent *agent, const Request *request, struct error *error) {
    const Signal *signal = request->signal;
    struct container *container = container_find(agent, signal->container_id);
    if (*signal->exec_id) {
        struct exec *exec = exec_find(agent, signal->container_id, signal->exec_id);
        return exec ? exec_signal(exec, (int)signal->signal, signal->all, error)
                    : fail_about(error, ESRCH, "signal", "exec is unknown");
    }
    return container ? container_signal(container, (int)signal->signal, signal->all, error)
                     : fail_about(error, ESRCH, "signal", "container is unknown");
}

static int resize(struct agent *agent, const Request *request, struct error *error) {
    const Resize *resize = request->resize;
    struct container *container = container_find(agent, resize->container_id);
    if (*resize->exec_id) {
        struct exec *exec = exec_find(agent, resize->container_id, resize->exec_id);
        return exec ? exec_resize(exec, resize, error)
                    : fail_about(error, ESRCH, "resize", "exec is unknown");
    }
    return container ? container_resize(container, resize, error)
                     : fail_about(error, ESRCH, "resize", "container is unknown");
}

static int write_cgroup(struct agent *agent, const Request *request, struct error *error) {
    return cgroup_requests_write(agent, request->write_cgroup, error);
}

static int change_files(struct agent *agent, const Request *request, struct error *error) {
    return live_change(agent, request->change_files, error);
}

static int keep_trees(struct agent *agent, const Request *request, struct error *error) {
    return live_keep(agent, request->keep_trees, error);
}

static int mount_exports(struct agent *agent, const Request *request, struct error *error) {
    return exports_mount(agent, request->mount_exports, error);
}

static int keep_exports(struct agent *agent, const Request *request, struct error *error) {
    return exports_keep(agent, request->keep_exports, error);
}

static int listen_sockets(struct agent *agent, const Request *request, struct error *error) {
    return sockets_listen(agent, request->listen_sockets, error);
}

static int keep_sockets(struct agent *agent, const Request *request, struct error *error) {
    (void)error;
    return sockets_keep(agent, request->keep_sockets);
}

// ----------------------------------------------------- requests that send their reply themselves

static void read_clocks(struct agent *agent, uint32_t id, const Request *request) {
    const ClockAdjustment *adjustment = request->read_clocks->adjustment;
    struct error error = {0};
    // in standalone mode the clocks are the machine's: only the request is checked
    if (adjustment && clock_adjust(adjustment, agent->test, &error) < 0) {
        reply_failure(agent, id, &error);
        return;
    }
    Reply reply = HUSK__GUEST__V1__REPLY__INIT;
    Clocks clocks = HUSK__GUEST__V1__CLOCKS__INIT;
    clock_read(&clocks);
    reply.body_case = HUSK__GUEST__V1__REPLY__BODY_CLOCKS;
    reply.clocks = &clocks;
    reply_send(agent, id, &reply);
}

static void start(struct agent *agent, uint32_t id, const Request *request) {
    derived_follow(agent); // the last block of memory may come online after the host's request
    container_start(agent, id, request->start);
}

static void exec(struct agent *agent, uint32_t id, const Request *request) {
    derived_follow(agent);
    exec_start(agent, id, request->exec);
}

static void attach(struct agent *agent, uint32_t id, const Request *request) {
    attach_start(agent, id, request->attach);
}

static void dial(struct agent *agent, uint32_t id, const Request *request) {
    dial_start(agent, id, request->dial);
}

static void accept_socket(struct agent *agent, uint32_t id, const Request *request) {
    sockets_accept(agent, id, request->accept_socket);
}

static void open_log(struct agent *agent, uint32_t id, const Request *request) {
    const OpenLog *open = request->open_log;
    struct container *container = container_find(agent, open->container_id);
    struct error error = {0};
    if (!container || !open->stream) {
        fail_about(&error, container ? EINVAL : ESRCH, "log", container ? "stream" : "container is unknown");
        reply_failure(agent, id, &error);
        return;
    }
    Reply reply = HUSK__GUEST__V1__REPLY__INIT;
    Husk__Guest__V1__LogOpened opened = HUSK__GUEST__V1__LOG_OPENED__INIT;
    opened.offset = log_open(&container->log, open->offset, open->stream, open->window);
    reply.body_case = HUSK__GUEST__V1__REPLY__BODY_LOG_OPENED;
    reply.log_opened = &opened;
    reply_send(agent, id, &reply);
}

static void read_cgroup(struct agent *agent, uint32_t id, const Request *request) {
    cgroup_requests_read(agent, id, request->read_cgroup);
}

static void remove_container(struct agent *agent, uint32_t id, const Request *request) {
    container_remove(agent, id, request->remove->container_id);
}

static void find_disk(struct agent *agent, uint32_t id, const Request *request) {
    disks_find(agent, id, request->find_disk->serial);
}

// ------------------------------------------------------------------------------- the table

// Exactly one of the two is set.
struct handler {
    int (*run)(struct agent *agent, const Request *request, struct error *error); // its result is the reply
    void (*start)(struct agent *agent, uint32_t id, const Request *request);      // replies, now or later
};

static const struct handler handlers[] = {
    [HUSK__GUEST__V1__REQUEST__BODY_PING] = {.run = ping},
    [HUSK__GUEST__V1__REQUEST__BODY_POWER_OFF] = {.run = power_off},
    [HUSK__GUEST__V1__REQUEST__BODY_READ_CLOCKS] = {.start = read_clocks},
    [HUSK__GUEST__V1__REQUEST__BODY_PREPARE] = {.run = prepare},
    [HUSK__GUEST__V1__REQUEST__BODY_ONLINE_CPUS] = {.run = bring_cpus_online},
    [HUSK__GUEST__V1__REQUEST__BODY_HUGE_PAGES] = {.run = reserve_huge_pages},
    [HUSK__GUEST__V1__REQUEST__BODY_CONFIGURE] = {.run = configure},
    [HUSK__GUEST__V1__REQUEST__BODY_START] = {.start = start},
    [HUSK__GUEST__V1__REQUEST__BODY_EXEC] = {.start = exec},
    [HUSK__GUEST__V1__REQUEST__BODY_SIGNAL] = {.run = send_signal},
    [HUSK__GUEST__V1__REQUEST__BODY_RESIZE] = {.run = resize},
    [HUSK__GUEST__V1__REQUEST__BODY_ATTACH] = {.start = attach},
    [HUSK__GUEST__V1__REQUEST__BODY_DIAL] = {.start = dial},
    [HUSK__GUEST__V1__REQUEST__BODY_OPEN_LOG] = {.start = open_log},
    [HUSK__GUEST__V1__REQUEST__BODY_WRITE_CGROUP] = {.run = write_cgroup},
    [HUSK__GUEST__V1__REQUEST__BODY_READ_CGROUP] = {.start = read_cgroup},
    [HUSK__GUEST__V1__REQUEST__BODY_REMOVE] = {.start = remove_container},
    [HUSK__GUEST__V1__REQUEST__BODY_CHANGE_FILES] = {.run = change_files},
    [HUSK__GUEST__V1__REQUEST__BODY_KEEP_TREES] = {.run = keep_trees},
    [HUSK__GUEST__V1__REQUEST__BODY_MOUNT_EXPORTS] = {.run = mount_exports},
    [HUSK__GUEST__V1__REQUEST__BODY_KEEP_EXPORTS] = {.run = keep_exports},
    [HUSK__GUEST__V1__REQUEST__BODY_RELEASE_INODES] = {.run = release_inodes},
    [HUSK__GUEST__V1__REQUEST__BODY_LISTEN_SOCKETS] = {.run = listen_sockets},
    [HUSK__GUEST__V1__REQUEST__BODY_KEEP_SOCKETS] = {.run = keep_sockets},
    [HUSK__GUEST__V1__REQUEST__BODY_ACCEPT_SOCKET] = {.start = accept_socket},
    [HUSK__GUEST__V1__REQUEST__BODY_FIND_DISK] = {.start = find_disk},
    [HUSK__GUEST__V1__REQUEST__BODY_REFRESH_NAMES] = {.run = refresh_cached_names},
    [HUSK__GUEST__V1__REQUEST__BODY_REFRESH_FILE] = {.run = refresh_cached_file},
};

// A body that a newer protocol has is an unknown field here, and its tag is the number of the body.
static void refuse(struct agent *agent, uint32_t id, const Request *request) {
    struct error error = {0};
    fail(&error, EOPNOTSUPP, "request");
    if (request->base.n_unknown_fields)
        snprintf(error.message, sizeof error.message, "body %u is unknown to this agent (protocol %d to %d)",
                 request->base.unknown_fields[0].tag, PROTOCOL_MIN, PROTOCOL_MAX);
    else
        snprintf(error.message, sizeof error.message, "has no body");
    reply_failure(agent, id, &error);
}

static void handle(struct agent *agent, uint32_t id, const Request *request) {
    size_t body = (size_t)request->body_case;
    struct handler handler = {0};
    struct error error = {0};
    if (body < sizeof handlers / sizeof handlers[0])
        handler = handlers[body];
    if (handler.run)
        reply_result(agent, id, handler.run(agent, request, &error), &error);
    else if (handler.start)
        handler.start(agent, id, request);
    else
        refuse(agent, id, request);
}

// --------------------------------------------------------------------------------- frames

void request_resync(void *context, const uint8_t nonce[TOKEN_SIZE]) {
    struct agent *agent = context;
    channel_reset(&agent->channel, nonce);
    for (struct exec *exec = agent->execs, *next; exec; exec = next) {
        next = exec->next;
        exec_disconnect(exec);
    }
    attach_disconnect(agent);
    dial_disconnect(agent);
    sockets_disconnect(agent);
    connection_disconnect(agent);
    for (struct container *container = agent->containers; container; container = container->next)
        container_disconnect(container);
}

static int handle_request(struct agent *agent, const struct frame *frame) {
    Request *request = husk__guest__v1__request__unpack(NULL, frame->length, frame->payload);
    if (!request)
        return FRAME_INVALID;
    handle(agent, frame->stream, request);
    husk__guest__v1__request__free_unpacked(request, NULL);
    return FRAME_HANDLED;
}

static int handle_stream(struct agent *agent, const struct frame *frame) {
    int handled = exec_frame(agent, frame);
    if (!handled)
        handled = attach_frame(agent, frame);
    if (!handled)
        handled = dial_frame(agent, frame);
    if (!handled)
        handled = sockets_frame(agent, frame);
    return handled ? handled : connection_frame(agent, frame);
}

int request_frame(void *context, const struct frame *frame) {
    struct agent *agent = context;
    if (frame->kind == FRAME_HELLO)
        return agent->channel.greeted ? FRAME_INVALID : hello_frame(agent, frame);
    if (!agent->channel.greeted || frame->stream == 0)
        return FRAME_INVALID;
    if (frame->kind == FRAME_REQUEST)
        return handle_request(agent, frame);
    struct container *container = container_of_log(agent, frame->stream);
    if (container && frame->kind == FRAME_WINDOW)
        log_acknowledge(&container->log, read_u32(frame->payload));
    else if (container && frame->kind == FRAME_RESET)
        container->log.stream = 0;
    else
        return handle_stream(agent, frame);
    return FRAME_HANDLED;
}
