#include "attach.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include "agent.h"
#include "clock.h"
#include "scope.h"

static uint64_t now_ms(void) {
    return monotonic_ns() / 1000000 + 1; // never 0
}

// --------------------------------------------------------------------------------------- ears

static size_t ear_room(const struct ear *ear) {
    size_t length = buffer_length(&ear->pending);
    return !ear->stream ? SIZE_MAX : length < ATTACH_BOUND ? ATTACH_BOUND - length : 0;
}

static void ear_close(struct ear *ear, struct channel *channel) {
    if (ear->stream)
        channel_send(channel, FRAME_CLOSE, ear->stream, NULL, 0);
    ear->stream = 0;
    buffer_free(&ear->pending);
}

static size_t ear_can_send(const struct ear *ear, const struct channel *channel) {
    size_t size = buffer_length(&ear->pending), room = channel_room(channel);
    size = size < ear->credit ? size : (size_t)ear->credit;
    size = size < room ? size : room;
    return size < DATA_MAX ? size : DATA_MAX;
}

static void ear_send(struct ear *ear, struct channel *channel) {
    for (size_t size; (size = ear_can_send(ear, channel)) > 0;) {
        channel_send(channel, FRAME_DATA, ear->stream, ear->pending.data + ear->pending.start, size);
        buffer_consume(&ear->pending, size);
        ear->credit -= size;
    }
}

static int index_of(const struct tap *tap) {
    return (int)(tap - tap->container->taps);
}

static size_t tee_room(const struct tap *tap) {
    size_t least = SIZE_MAX;
    const struct container *container = tap->container;
    for (struct attachment *each = container->agent->attachments; each; each = each->next) {
        size_t room = each->container == container ? ear_room(&each->ears[index_of(tap)]) : SIZE_MAX;
        least = room < least ? room : least;
    }
    return least;
}

static void tee_take(const struct tap *tap, const uint8_t *bytes, size_t size) {
    const struct container *container = tap->container;
    for (struct attachment *each = container->agent->attachments; each; each = each->next) {
        struct ear *ear = &each->ears[index_of(tap)];
        if (each->container == container && ear->stream)
            buffer_append(&ear->pending, bytes, size);
    }
}

const struct tee attach_tee = {.room = tee_room, .take = tee_take};

// ------------------------------------------------------------------------------------- stdin

// The container's stdin ends, for whoever else writes to it too.
static void end_stdin(struct container *container) {
    for (struct attachment *each = container->agent->attachments; each; each = each->next)
        if (each->container == container && each->inlet.source.fd >= 0)
            inlet_refuse(&each->inlet, each->agent);
    close_fd(&container->stdin_pipe);
}

static void open_stdin(struct attachment *attachment) {
    struct container *container = attachment->container;
    struct inlet *inlet = &attachment->inlet;
    int fd = container->terminal ? container->taps[0].source.fd : container->stdin_pipe;
    if (!inlet->stream)
        return;
    inlet->source.fd = container->has_stdin && fd >= 0 ? fcntl(fd, F_DUPFD_CLOEXEC, 3) : -1;
    if (inlet->source.fd < 0) {
        inlet_refuse(inlet, attachment->agent);
        return;
    }
    loop_add(&attachment->agent->loop, &inlet->source, EPOLLOUT);
    inlet_begin(inlet, &attachment->agent->channel);
}

static void pump_stdin(struct attachment *attachment) {
    bool was_open = attachment->inlet.source.fd >= 0;
    inlet_pump(&attachment->inlet, attachment->agent);
    bool ended = was_open && attachment->inlet.source.fd < 0;
    // a terminal has no half-close: it stays
    if (ended && attachment->stdin_once && attachment->container && !attachment->container->terminal)
        end_stdin(attachment->container);
}

// ------------------------------------------------------------------------------------- ending

static void release(struct attachment *attachment) {
    struct agent *agent = attachment->agent;
    struct attachment **link = &agent->attachments;
    while (*link != attachment)
        link = &(*link)->next;
    *link = attachment->next;
    agent->attachment_count--;
    for (int i = 0; i < 2; i++)
        buffer_free(&attachment->ears[i].pending);
    inlet_close(&attachment->inlet, agent);
    free(attachment);
}

static void finish(struct attachment *attachment) {
    Event event = HUSK__GUEST__V1__EVENT__INIT;
    Detached detached = HUSK__GUEST__V1__DETACHED__INIT;
    detached.container_id = attachment->container_id;
    detached.attach_id = attachment->id;
    detached.stalled = attachment->late;
    event.body_case = HUSK__GUEST__V1__EVENT__BODY_DETACHED;
    event.detached = &detached;
    send_event(attachment->agent, &event);
    release(attachment);
}

static bool is_over(const struct attachment *attachment) {
    return !attachment->ears[0].stream && !attachment->ears[1].stream && attachment->inlet.source.fd < 0;
}

void attach_container_ended(struct container *container) {
    for (struct attachment *each = container->agent->attachments; each; each = each->next) {
        if (each->container != container)
            continue;
        each->container = NULL;
        inlet_refuse(&each->inlet, each->agent);
    }
}

void attach_disconnect(struct agent *agent) {
    for (struct attachment *each = agent->attachments, *next; each; each = next) {
        next = each->next;
        struct container *container = each->container;
        if (each->stdin_once && container && each->inlet.source.fd >= 0 && !container->terminal)
            close_fd(&container->stdin_pipe);
        release(each);
    }
}

// ----------------------------------------------------------------------------------- starting

static struct attachment *make(struct agent *agent, struct container *container, const Attach *message) {
    struct attachment *attachment = memory_get(sizeof *attachment);
    *attachment = (struct attachment){
        .agent = agent,
        .next = agent->attachments,
        .container = container,
        .ears = {{.stream = message->stdout_stream, .credit = message->window},
                 {.stream = message->stderr_stream, .credit = message->window}},
        .inlet = inlet_make(message->stdin_stream),
        .stdin_once = message->stdin_once,
        .stall_timeout_ms = message->stall_timeout_ms,
    };
    snprintf(attachment->container_id, sizeof attachment->container_id, "%s", message->container_id);
    snprintf(attachment->id, sizeof attachment->id, "%s", message->attach_id);
    agent->attachments = attachment;
    agent->attachment_count++;
    return attachment;
}

static int check(struct agent *agent, const Attach *message, struct error *error) {
    struct container *container = container_find(agent, message->container_id);
    if (!container || container->process.state != PROCESS_RUNNING)
        return fail_about(error, ESRCH, "container", container ? "does not run" : "is unknown");
    if (!is_id(message->attach_id))
        return fail_about(error, EINVAL, "attach", "id");
    if (agent->attachment_count >= ATTACHMENTS_MAX)
        return fail_about(error, EMFILE, "attach", "attachments");
    return 0;
}

void attach_start(struct agent *agent, uint32_t request, const Attach *message) {
    struct error error = {0};
    if (check(agent, message, &error) < 0) {
        reply_failure(agent, request, &error);
        return;
    }
    struct attachment *attachment = make(agent, container_find(agent, message->container_id), message);
    reply_done(agent, request);
    open_stdin(attachment);
}

// --------------------------------------------------------------------------------- every turn

int attach_frame(struct agent *agent, const struct frame *frame) {
    for (struct attachment *each = agent->attachments; each; each = each->next) {
        int taken = inlet_frame(&each->inlet, frame);
        if (taken)
            return taken;
        for (int i = 0; i < 2; i++) {
            struct ear *ear = &each->ears[i];
            if (ear->stream != frame->stream)
                continue;
            if (frame->kind == FRAME_WINDOW)
                ear->credit += read_u32(frame->payload);
            if (frame->kind == FRAME_RESET)
                ear_close(ear, &agent->channel);
            return 1;
        }
    }
    return 0;
}

static void cut_off(struct attachment *attachment) {
    attachment->late = true;
    for (int i = 0; i < 2; i++)
        ear_close(&attachment->ears[i], &attachment->agent->channel);
    inlet_refuse(&attachment->inlet, attachment->agent);
}

static void look_at_patience(struct attachment *attachment) {
    bool stuck = false;
    for (int i = 0; i < 2; i++)
        stuck |= attachment->container && ear_room(&attachment->ears[i]) == 0;
    if (!stuck)
        attachment->stuck_since_ms = 0;
    else if (!attachment->stuck_since_ms)
        attachment->stuck_since_ms = now_ms();
    else if (now_ms() - attachment->stuck_since_ms >= attachment->stall_timeout_ms)
        cut_off(attachment);
}

void attach_pump(struct agent *agent) {
    for (struct attachment *each = agent->attachments, *next; each; each = next) {
        next = each->next;
        pump_stdin(each);
        for (int i = 0; i < 2; i++) {
            ear_send(&each->ears[i], &agent->channel);
            if (!each->container && buffer_length(&each->ears[i].pending) == 0)
                ear_close(&each->ears[i], &agent->channel);
        }
        look_at_patience(each);
        if (is_over(each))
            finish(each);
    }
}

bool attach_has_work(const struct agent *agent) {
    for (const struct attachment *each = agent->attachments; each; each = each->next)
        for (int i = 0; i < 2; i++)
            if (ear_can_send(&each->ears[i], &agent->channel) > 0)
                return true;
    return false;
}

int attach_timeout_ms(const struct agent *agent) {
    uint64_t now = now_ms(), least = INT_MAX;
    bool any = false;
    for (const struct attachment *each = agent->attachments; each; each = each->next) {
        if (!each->stuck_since_ms)
            continue;
        uint64_t end = each->stuck_since_ms + each->stall_timeout_ms;
        uint64_t left = end > now ? end - now : 0;
        least = left < least ? left : least;
        any = true;
    }
    return any ? (int)least : -1;
}
