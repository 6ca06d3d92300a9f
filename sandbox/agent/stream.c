#include "stream.h"

#include <errno.h>
#include <stddef.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "agent.h"

enum {
    INPUT_BATCH = 32 * 1024, // credit is returned in pieces of at least this, or once all is written
    MOVES_IN_A_ROW = 4,
};

// ------------------------------------------------------------------------------------ outputs

static void output_stream_ready(struct source *source, uint32_t events) {
    (void)events;
    container_of(source, struct output_stream, source)->readable = true;
}

struct output_stream output_stream_make(uint32_t stream, uint32_t credit) {
    return (struct output_stream){.source = {.fd = -1, .ready = output_stream_ready},
                                  .stream = stream,
                                  .credit = credit,
                                  .readable = true};
}

void output_stream_close(struct output_stream *output, struct agent *agent) {
    loop_close(&agent->loop, &output->source);
    output->stream = 0;
}

void output_stream_end(struct output_stream *output, struct agent *agent) {
    if (output->stream)
        channel_send(&agent->channel, FRAME_CLOSE, output->stream, NULL, 0);
    output_stream_close(output, agent);
}

// Whether the pipe is empty, so that a CLOSE needs no credit.
static bool is_drained(const struct output_stream *output) {
    int bytes = 0;
    return ioctl(output->source.fd, FIONREAD, &bytes) == 0 && bytes == 0;
}

static ssize_t receive(struct output_stream *output, uint8_t *bytes, size_t size) {
    if (!output->no_descriptors)
        return read(output->source.fd, bytes, size);
    struct iovec vector = {.iov_base = bytes, .iov_len = size};
    struct msghdr header = {.msg_iov = &vector, .msg_iovlen = 1};
    ssize_t got = recvmsg(output->source.fd, &header, 0);
    output->refused = got >= 0 && (header.msg_flags & MSG_CTRUNC);
    return output->refused ? 0 : got;
}

// Moves one piece; returns whether more may follow. A background process that holds the pipe open does not
// keep the exec alive.
static bool output_stream_move(struct output_stream *output, struct agent *agent, bool last) {
    static uint8_t scratch[DATA_MAX];
    struct channel *channel = &agent->channel;
    bool dropped = !output->stream;
    size_t space = channel_space(channel), size = DATA_MAX;
    if (!dropped) {
        size = size < output->credit ? size : (size_t)output->credit;
        size = size < space ? size : space;
        if (size == 0) {
            if (space > 0 && last && is_drained(output))
                output_stream_end(output, agent);
            return false;
        }
    }
    ssize_t got = receive(output, dropped ? scratch : channel_begin(channel, size), size);
    if (got < 0 && errno == EINTR)
        return true;
    if (got < 0 && errno == EAGAIN && !last) {
        output->readable = false;
        return false;
    }
    if (got <= 0) {
        output_stream_end(output, agent);
        return false;
    }
    if (!dropped) {
        channel_commit(channel, FRAME_DATA, output->stream, (size_t)got);
        output->credit -= (size_t)got;
    }
    return true;
}

void output_stream_pump(struct output_stream *output, struct agent *agent, bool last, bool hold_end) {
    for (int i = 0; i < MOVES_IN_A_ROW && output->source.fd >= 0 && (output->readable || last); i++) {
        if (hold_end && is_drained(output))
            output->readable = false; // the next read might find its end
        else if (!output_stream_move(output, agent, last))
            return;
    }
}

bool output_stream_has_work(const struct output_stream *output, const struct channel *channel, bool last) {
    if (output->source.fd < 0 || !(output->readable || last))
        return false;
    return !output->stream || (output->credit > 0 && channel_space(channel) > 0);
}

int output_stream_frame(struct output_stream *output, struct agent *agent, const struct frame *frame) {
    if (!output->stream || output->stream != frame->stream)
        return FRAME_IGNORED;
    if (frame->kind == FRAME_WINDOW)
        output->credit += read_u32(frame->payload);
    if (frame->kind == FRAME_RESET) // the writer gets EPIPE, as with any reader that closes its end
        output_stream_end(output, agent);
    return FRAME_HANDLED;
}

// ------------------------------------------------------------------------------------- inputs

static void input_stream_ready(struct source *source, uint32_t events) {
    struct input_stream *input = container_of(source, struct input_stream, source);
    input->writable = true;
    input->hung_up |= events & EPOLLHUP;
}

struct input_stream input_stream_make(uint32_t stream) {
    return (struct input_stream){.source = {.fd = -1, .ready = input_stream_ready},
                                 .stream = stream,
                                 .ended = !stream,
                                 .writable = true};
}

static void input_stream_grant(struct input_stream *input, struct channel *channel, uint32_t bytes) {
    uint8_t payload[4];
    if (!input->stream || bytes == 0)
        return;
    write_u32(payload, bytes);
    channel_send(channel, FRAME_WINDOW, input->stream, payload, sizeof payload);
    input->granted += bytes;
}

void input_stream_begin(struct input_stream *input, struct channel *channel, uint32_t bytes) {
    input_stream_grant(input, channel, bytes);
}

void input_stream_close(struct input_stream *input, struct agent *agent) {
    loop_close(&agent->loop, &input->source);
    buffer_free(&input->pending);
}

void input_stream_refuse(struct input_stream *input, struct agent *agent) {
    if (input->stream && !input->ended)
        channel_send(&agent->channel, FRAME_RESET, input->stream, NULL, 0);
    input->stream = 0;
    input_stream_close(input, agent);
}

// Returns 0 if the rest of the message is still to come.
static ssize_t write_message(const struct input_stream *input, const uint8_t *bytes, size_t length) {
    size_t size = length < LENGTH_BYTES ? 0 : read_u32(bytes);
    if (size > MESSAGE_MAX) {
        errno = EPROTO;
        return -1;
    }
    if (length < LENGTH_BYTES + size)
        return 0;
    ssize_t sent = send(input->source.fd, bytes + LENGTH_BYTES, size, MSG_NOSIGNAL);
    return sent < 0 ? -1 : (ssize_t)(LENGTH_BYTES + size);
}

// Returns whether more may follow.
static bool input_stream_write(struct input_stream *input, struct agent *agent) {
    const uint8_t *bytes = input->pending.data + input->pending.start;
    size_t length = buffer_length(&input->pending);
    ssize_t written =
        input->messages ? write_message(input, bytes, length) : write(input->source.fd, bytes, length);
    if (written > 0) {
        buffer_consume(&input->pending, (size_t)written);
        input->consumed += (uint32_t)written;
    } else if (written == 0) {
        if (input->ended)
            buffer_free(&input->pending);
        return false;
    } else if (errno == EAGAIN) {
        input->writable = false;
    } else if (errno != EINTR) { // there is no reader any more
        input_stream_refuse(input, agent);
    }
    return input->source.fd >= 0 && input->writable;
}

void input_stream_pump(struct input_stream *input, struct agent *agent) {
    while (input->source.fd >= 0 && input->writable && buffer_length(&input->pending) > 0)
        if (!input_stream_write(input, agent))
            break;
    bool empty = buffer_length(&input->pending) == 0;
    if (input->consumed >= INPUT_BATCH || (empty && input->consumed > 0)) {
        if (!input->ended)
            input_stream_grant(input, &agent->channel, input->consumed);
        input->consumed = 0;
    }
    if (input->ended && empty && input->source.fd >= 0) {
        if (input->socket)
            shutdown(input->source.fd, SHUT_WR);
        input_stream_close(input, agent);
    }
}

int input_stream_frame(struct input_stream *input, const struct frame *frame) {
    if (!input->stream || input->stream != frame->stream)
        return FRAME_IGNORED;
    if (frame->kind == FRAME_CLOSE)
        input->ended = true;
    if (frame->kind != FRAME_DATA)
        return FRAME_HANDLED;
    if (frame->length > input->granted || input->ended)
        return FRAME_INVALID;
    input->granted -= frame->length;
    if (input->source.fd >= 0)
        buffer_append(&input->pending, frame->payload, frame->length);
    return FRAME_HANDLED;
}
