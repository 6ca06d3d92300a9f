#include "attach.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include "clock.h"
#include "reply.h"
#include "scope.h"

static uint64_t now_ms(void) {
    return monotonic_ns() / 1000000 + 1; // never 0
}

// ------------------------------------------------------------------------------------- queues

static size_t queue_space(const struct output_queue *queue) {
    size_t length = buffer_length(&queue->pending);
    return !queue->stream ? SIZE_MAX : length < ATTACH_BOUND ? ATTACH_BOUND - length : 0;
}

static void queue_close(struct output_queue *queue, struct channel *channel) {
    if (queue->stream)
        channel_send(channel, FRAME_CLOSE, queue->stream, NULL, 0);
    queue->stream = 0;
    buffer_free(&queue->pending);
}

static size_t queue_sendable(const struct output_queue *queue, const struct channel *channel) {
    size_t size = buffer_length(&queue->pending), space = channel_space(channel);
    size = size < queue->credit ? size : (size_t)queue->credit;
    size = size < space ? size : space;
    return size < DATA_MAX ? size : DATA_MAX;
}

static void queue_send(struct output_queue *queue, struct channel *channel) {
    for (size_t size; (size = queue_sendable(queue, channel)) > 0;) {
        channel_send(channel, FRAME_DATA, queue->stream, queue->pending.data + queue->pending.start, size);
        buffer_consume(&queue->pending, size);
        queue->credit -= size;
    }
}

static int index_of(const struct stdio_reader *reader) {
    return (int)(reader - reader->container->stdio);
}

static size_t observer_space(const struct stdio_reader *reader) {
    size_t least = SIZE_MAX;
    const struct container *container = reader->container;
    for (struct attachment *each = container->agent->attachments; each; each = each->next) {
        size_t space = each->container == container ? queue_space(&each->queues[index_of(reader)]) : SIZE_MAX;
        least = space < least ? space : least;
    }
    return least;
}

static void observer_output(const struct stdio_reader *reader, const uint8_t *bytes, size_t size) {
    const struct container *container = reader->container;
    for (struct attachment *each = container->agent->attachments; each; each = each->next) {
        struct output_queue *queue = &each->queues[index_of(reader)];
        if (each->container == container && queue->stream)
            buffer_append(&queue->pending, bytes, size);
    }
}

static void observer_ended(struct container *container) {
    for (struct attachment *each = container->agent->attachments; each; each = each->next) {
        if (each->container != container)
            continue;
        each->container = NULL;
        input_stream_refuse(&each->input, each->agent);
    }
}

const struct observer attach_observer = {
    .space = observer_space, .output = observer_output, .ended = observer_ended};

// ------------------------------------------------------------------------------------- stdin

// Closes the container's stdin, for all attachments.
static void end_stdin(struct container *container) {
    for (struct attachment *each = container->agent->attachments; each; each = each->next)
        if (each->container == container && each->input.source.fd >= 0)
            input_stream_refuse(&each->input, each->agent);
    close_fd(&container->stdin_pipe);
}

static void open_stdin(struct attachment *attachment) {
    struct container *container = attachment->container;
    struct input_stream *input = &attachment->input;
    int fd = container->terminal ? container->stdio[0].source.fd : container->stdin_pipe;
    if (!input->stream)
        return;
    input->source.fd = container->has_stdin && fd >= 0 ? fcntl(fd, F_DUPFD_CLOEXEC, 3) : -1;
    if (input->source.fd < 0) {
        input_stream_refuse(input, attachment->agent);
        return;
    }
    loop_add(&attachment->agent->loop, &input->source, EPOLLOUT);
    input_stream_begin(input, &attachment->agent->channel, INPUT_WINDOW);
}

static void pump_stdin(struct attachment *attachment) {
    bool was_open = attachment->input.source.fd >= 0;
    input_stream_pump(&attachment->input, attachment->agent);
    bool ended = was_open && attachment->input.source.fd < 0;
    // a terminal has no half-close: it stays open
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
        buffer_free(&attachment->queues[i].pending);
    input_stream_close(&attachment->input, agent);
    free(attachment);
}

static void finish(struct attachment *attachment) {
    Event event = HUSK__GUEST__V1__EVENT__INIT;
    Detached detached = HUSK__GUEST__V1__DETACHED__INIT;
    detached.container_id = attachment->container_id;
    detached.attach_id = attachment->id;
    detached.stalled = attachment->stalled;
    event.body_case = HUSK__GUEST__V1__EVENT__BODY_DETACHED;
    event.detached = &detached;
    send_event(attachment->agent, &event);
    release(attachment);
}

static bool is_done(const struct attachment *attachment) {
    return !attachment->queues[0].stream && !attachment->queues[1].stream && attachment->input.source.fd < 0;
}

void attach_disconnect(struct agent *agent) {
    for (struct attachment *each = agent->attachments, *next; each; each = next) {
        next = each->next;
        struct container *container = each->container;
        if (each->stdin_once && container && each->input.source.fd >= 0 && !container->terminal)
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
        .queues = {{.stream = message->stdout_stream, .credit = message->window},
                   {.stream = message->stderr_stream, .credit = message->window}},
        .input = input_stream_make(message->stdin_stream),
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
        return fail_about(error, ESRCH, "container", container ? "is not running" : "is unknown");
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
        int handled = input_stream_frame(&each->input, frame);
        if (handled)
            return handled;
        for (int i = 0; i < 2; i++) {
            struct output_queue *queue = &each->queues[i];
            if (queue->stream != frame->stream)
                continue;
            if (frame->kind == FRAME_WINDOW)
                queue->credit += read_u32(frame->payload);
            if (frame->kind == FRAME_RESET)
                queue_close(queue, &agent->channel);
            return 1;
        }
    }
    return 0;
}

static void detach_stalled(struct attachment *attachment) {
    attachment->stalled = true;
    for (int i = 0; i < 2; i++)
        queue_close(&attachment->queues[i], &attachment->agent->channel);
    input_stream_refuse(&attachment->input, attachment->agent);
}

static void check_stall(struct attachment *attachment) {
    bool stalled = false;
    for (int i = 0; i < 2; i++)
        stalled |= attachment->container && queue_space(&attachment->queues[i]) == 0;
    if (!stalled)
        attachment->stalled_since_ms = 0;
    else if (!attachment->stalled_since_ms)
        attachment->stalled_since_ms = now_ms();
    else if (now_ms() - attachment->stalled_since_ms >= attachment->stall_timeout_ms)
        detach_stalled(attachment);
}

void attach_pump(struct agent *agent) {
    for (struct attachment *each = agent->attachments, *next; each; each = next) {
        next = each->next;
        pump_stdin(each);
        for (int i = 0; i < 2; i++) {
            queue_send(&each->queues[i], &agent->channel);
            if (!each->container && buffer_length(&each->queues[i].pending) == 0)
                queue_close(&each->queues[i], &agent->channel);
        }
        check_stall(each);
        if (is_done(each))
            finish(each);
    }
}

bool attach_has_work(const struct agent *agent) {
    for (const struct attachment *each = agent->attachments; each; each = each->next)
        for (int i = 0; i < 2; i++)
            if (queue_sendable(&each->queues[i], &agent->channel) > 0)
                return true;
    return false;
}

int attach_timeout_ms(const struct agent *agent) {
    uint64_t now = now_ms(), least = INT_MAX;
    bool any = false;
    for (const struct attachment *each = agent->attachments; each; each = each->next) {
        if (!each->stalled_since_ms)
            continue;
        uint64_t end = each->stalled_since_ms + each->stall_timeout_ms;
        uint64_t left = end > now ? end - now : 0;
        least = left < least ? left : least;
        any = true;
    }
    return any ? (int)least : -1;
}
