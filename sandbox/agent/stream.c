#include "stream.h"

#include <errno.h>
#include <stddef.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "agent.h"

enum {
    INLET_WINDOW = 128 * 1024,
    INLET_BATCH = 32 * 1024, // credit is given back in pieces of at least this, or when all is written
    MOVES_IN_A_ROW = 4,
};

// ------------------------------------------------------------------------------------ outlets

static void outlet_ready(struct source *source, uint32_t events) {
    (void)events;
    container_of(source, struct outlet, source)->readable = true;
}

struct outlet outlet_make(uint32_t stream, uint32_t credit) {
    return (struct outlet){
        .source = {.fd = -1, .ready = outlet_ready}, .stream = stream, .credit = credit, .readable = true};
}

void outlet_close(struct outlet *outlet, struct agent *agent) {
    loop_close(&agent->loop, &outlet->source);
    outlet->stream = 0;
}

void outlet_end(struct outlet *outlet, struct agent *agent) {
    if (outlet->stream)
        channel_send(&agent->channel, FRAME_CLOSE, outlet->stream, NULL, 0);
    outlet_close(outlet, agent);
}

// Nothing is in the pipe: so a CLOSE needs no credit.
static bool is_drained(const struct outlet *outlet) {
    int bytes = 0;
    return ioctl(outlet->source.fd, FIONREAD, &bytes) == 0 && bytes == 0;
}

// One piece. A background process that holds the pipe does not keep the exec alive.
static bool outlet_move(struct outlet *outlet, struct agent *agent, bool last) {
    static uint8_t nowhere[DATA_MAX];
    struct channel *channel = &agent->channel;
    bool silent = !outlet->stream;
    size_t room = channel_room(channel), size = DATA_MAX;
    if (!silent) {
        size = size < outlet->credit ? size : (size_t)outlet->credit;
        size = size < room ? size : room;
        if (size == 0) {
            if (room > 0 && last && is_drained(outlet))
                outlet_end(outlet, agent);
            return false;
        }
    }
    ssize_t got = read(outlet->source.fd, silent ? nowhere : channel_begin(channel, size), size);
    if (got < 0 && errno == EINTR)
        return true;
    if (got < 0 && errno == EAGAIN && !last) {
        outlet->readable = false;
        return false;
    }
    if (got <= 0) {
        outlet_end(outlet, agent);
        return false;
    }
    if (!silent) {
        channel_commit(channel, FRAME_DATA, outlet->stream, (size_t)got);
        outlet->credit -= (size_t)got;
    }
    return true;
}

void outlet_pump(struct outlet *outlet, struct agent *agent, bool last, bool keep) {
    for (int i = 0; i < MOVES_IN_A_ROW && outlet->source.fd >= 0 && (outlet->readable || last); i++) {
        if (keep && is_drained(outlet))
            outlet->readable = false; // there may be its end to read
        else if (!outlet_move(outlet, agent, last))
            return;
    }
}

bool outlet_has_work(const struct outlet *outlet, const struct channel *channel, bool last) {
    if (outlet->source.fd < 0 || !(outlet->readable || last))
        return false;
    return !outlet->stream || (outlet->credit > 0 && channel_room(channel) > 0);
}

int outlet_frame(struct outlet *outlet, struct agent *agent, const struct frame *frame) {
    if (!outlet->stream || outlet->stream != frame->stream)
        return 0;
    if (frame->kind == FRAME_WINDOW)
        outlet->credit += read_u32(frame->payload);
    if (frame->kind == FRAME_RESET) // who writes finds the pipe broken, as with any reader that goes
        outlet_end(outlet, agent);
    return 1;
}

// ------------------------------------------------------------------------------------- inlets

static void inlet_ready(struct source *source, uint32_t events) {
    (void)events;
    container_of(source, struct inlet, source)->writable = true;
}

struct inlet inlet_make(uint32_t stream) {
    return (struct inlet){
        .source = {.fd = -1, .ready = inlet_ready}, .stream = stream, .ended = !stream, .writable = true};
}

static void inlet_grant(struct inlet *inlet, struct channel *channel, uint32_t bytes) {
    uint8_t payload[4];
    if (!inlet->stream || bytes == 0)
        return;
    write_u32(payload, bytes);
    channel_send(channel, FRAME_WINDOW, inlet->stream, payload, sizeof payload);
    inlet->granted += bytes;
}

void inlet_begin(struct inlet *inlet, struct channel *channel) {
    inlet_grant(inlet, channel, INLET_WINDOW);
}

void inlet_close(struct inlet *inlet, struct agent *agent) {
    loop_close(&agent->loop, &inlet->source);
    buffer_free(&inlet->pending);
}

void inlet_refuse(struct inlet *inlet, struct agent *agent) {
    if (inlet->stream && !inlet->ended)
        channel_send(&agent->channel, FRAME_RESET, inlet->stream, NULL, 0);
    inlet->stream = 0;
    inlet_close(inlet, agent);
}

static void inlet_write(struct inlet *inlet, struct agent *agent) {
    ssize_t written =
        write(inlet->source.fd, inlet->pending.data + inlet->pending.start, buffer_length(&inlet->pending));
    if (written > 0) {
        buffer_consume(&inlet->pending, (size_t)written);
        inlet->consumed += (uint32_t)written;
    } else if (errno == EAGAIN) {
        inlet->writable = false;
    } else if (errno != EINTR) { // nobody reads any more
        inlet_refuse(inlet, agent);
    }
}

void inlet_pump(struct inlet *inlet, struct agent *agent) {
    while (inlet->source.fd >= 0 && inlet->writable && buffer_length(&inlet->pending) > 0)
        inlet_write(inlet, agent);
    bool empty = buffer_length(&inlet->pending) == 0;
    if (inlet->consumed >= INLET_BATCH || (empty && inlet->consumed > 0)) {
        if (!inlet->ended)
            inlet_grant(inlet, &agent->channel, inlet->consumed);
        inlet->consumed = 0;
    }
    if (inlet->ended && empty && inlet->source.fd >= 0) {
        if (inlet->socket)
            shutdown(inlet->source.fd, SHUT_WR);
        inlet_close(inlet, agent);
    }
}

int inlet_frame(struct inlet *inlet, const struct frame *frame) {
    if (!inlet->stream || inlet->stream != frame->stream)
        return 0;
    if (frame->kind == FRAME_CLOSE)
        inlet->ended = true;
    if (frame->kind != FRAME_DATA)
        return 1;
    if (frame->length > inlet->granted || inlet->ended)
        return -1;
    inlet->granted -= frame->length;
    if (inlet->source.fd >= 0)
        buffer_append(&inlet->pending, frame->payload, frame->length);
    return 1;
}
