#include "connection.h"

#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <sys/socket.h>
#include <unistd.h>

#include "credentials.h"
#include "scope.h"

enum { MESSAGES_IN_A_ROW = 4, STREAM_WINDOW = 64 * 1024 };

static void release(struct connection *connection) {
    struct agent *agent = connection->agent;
    struct connection **link = &agent->connections;
    while (*link != connection)
        link = &(*link)->next;
    *link = connection->next;
    input_stream_close(&connection->input, agent);
    output_stream_close(&connection->output, agent);
    buffer_free(&connection->rest);
    free(connection);
}

// Each direction gets its own descriptor of the socket, and so its own source.
struct connection *connection_open(struct agent *agent, int fd, uint32_t to_guest, uint32_t from_guest,
                                   uint32_t window, struct error *error) {
    int other = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    if (other < 0) {
        fail(error, errno, "connection");
        close(fd);
        return NULL;
    }
    struct connection *connection = memory_get(sizeof *connection);
    *connection = (struct connection){
        .agent = agent,
        .next = agent->connections,
        .input = input_stream_make(to_guest),
        .output = output_stream_make(from_guest, window),
    };
    connection->input.socket = true;
    connection->input.source.fd = other;
    connection->output.source.fd = fd;
    loop_add(&agent->loop, &connection->input.source, EPOLLOUT);
    loop_add(&agent->loop, &connection->output.source, EPOLLIN | EPOLLRDHUP);
    agent->connections = connection;
    return connection;
}

void connection_begin(struct connection *connection) {
    connection->input.messages = connection->messages;
    if (connection->listener) // there is no sender to answer
        input_stream_refuse(&connection->input, connection->agent);
    else
        input_stream_begin(&connection->input, &connection->agent->channel,
                           connection->messages ? INPUT_WINDOW : STREAM_WINDOW);
}

// ----------------------------------------------------------------------------------- messages

static void reset(struct connection *connection) {
    buffer_free(&connection->rest);
    input_stream_refuse(&connection->input, connection->agent);
    output_stream_end(&connection->output, connection->agent);
}

// Whether the next message is of the same sender as those before.
static bool is_senders(const struct connection *connection) {
    uid_t uid;
    gid_t gid;
    return !connection->listener || !credentials_of_message(connection->output.source.fd, &uid, &gid) ||
           (uid == connection->uid && gid == connection->gid);
}

// Reads a message into `rest`. Returns whether there is one to send.
static bool read_message(struct connection *connection) {
    static uint8_t message[MESSAGE_MAX];
    struct output_stream *output = &connection->output;
    if (!output->readable)
        return false;
    if (!is_senders(connection)) {
        output_stream_end(output, connection->agent);
        return false;
    }
    struct iovec bytes = {.iov_base = message, .iov_len = sizeof message};
    union credentials_space space; // enough for them and for no descriptor
    struct msghdr header = {.msg_iov = &bytes, .msg_iovlen = 1};
    if (connection->listener) {
        header.msg_control = &space;
        header.msg_controllen = sizeof space;
    }
    ssize_t size = recvmsg(output->source.fd, &header, MSG_TRUNC);
    if (size < 0 && (errno == EAGAIN || errno == EINTR)) {
        output->readable = errno == EINTR;
        return false;
    }
    if (size < 0 || (size == 0 && socket_has_ended(output->source.fd))) {
        output_stream_end(output, connection->agent);
        return false;
    }
    if ((header.msg_flags & MSG_CTRUNC) || size > MESSAGE_MAX) {
        if (!connection->listener)
            reset(connection);
        return false;
    }
    uint8_t length[LENGTH_BYTES];
    write_u32(length, (uint32_t)size);
    buffer_append(&connection->rest, length, sizeof length);
    buffer_append(&connection->rest, message, (size_t)size);
    return true;
}

static void pump_messages(struct connection *connection) {
    struct output_stream *output = &connection->output;
    struct channel *channel = &connection->agent->channel;
    struct buffer *rest = &connection->rest;
    for (int i = 0; i < MESSAGES_IN_A_ROW && output->source.fd >= 0; i++) {
        if (buffer_length(rest) == 0 && !read_message(connection))
            continue;
        size_t size = buffer_length(rest), space = channel_space(channel);
        size = size < output->credit ? size : (size_t)output->credit;
        size = size < space ? size : space;
        size = size < DATA_MAX ? size : DATA_MAX;
        if (size == 0)
            return;
        channel_send(channel, FRAME_DATA, output->stream, rest->data + rest->start, size);
        output->credit -= size;
        buffer_consume(rest, size);
    }
}

// --------------------------------------------------------------------------------- every turn

int connection_frame(struct agent *agent, const struct frame *frame) {
    for (struct connection *connection = agent->connections; connection; connection = connection->next) {
        int handled = input_stream_frame(&connection->input, frame);
        if (handled)
            return handled;
        struct output_stream *output = &connection->output;
        bool ended = frame->kind == FRAME_RESET && output->stream == frame->stream;
        if (ended && output->source.fd >= 0 && !connection->listener)
            shutdown(output->source.fd, SHUT_RD); // its peer gets EPIPE
        handled = output_stream_frame(output, agent, frame);
        if (handled) {
            connection->hung_up |= ended && connection->whole;
            return handled;
        }
    }
    return 0;
}

static void move(struct connection *connection) {
    struct agent *agent = connection->agent;
    if (connection->hung_up)
        input_stream_refuse(&connection->input, agent);
    input_stream_pump(&connection->input, agent);
    if (connection->messages)
        pump_messages(connection);
    else
        output_stream_pump(&connection->output, agent, false, false);
    if (connection->output.source.fd >= 0)
        return;
    if (connection->input.hung_up || connection->output.refused) // what is still to come has no reader
        input_stream_refuse(&connection->input, agent);
    if (connection->input.source.fd < 0)
        release(connection);
}

void connection_pump(struct agent *agent) {
    for (struct connection *connection = agent->connections, *next; connection; connection = next) {
        next = connection->next;
        move(connection);
    }
}

bool connection_has_work(const struct agent *agent) {
    for (const struct connection *connection = agent->connections; connection;
         connection = connection->next) {
        const struct output_stream *output = &connection->output;
        bool held = buffer_length(&connection->rest) > 0;
        if (held ? output->credit > 0 && channel_space(&agent->channel) > 0
                 : output_stream_has_work(output, &agent->channel, false))
            return true;
    }
    return false;
}

void connection_disconnect(struct agent *agent) {
    while (agent->connections)
        release(agent->connections);
}
