// The two directions of a stream, between a descriptor in the guest and the channel. Used by execs, by
// attachments (their stdin) and by dialled connections. A reader that stops blocks its own stream only.
#pragma once

#include "channel.h"

struct agent;

enum { INPUT_WINDOW = 128 * 1024, MESSAGE_MAX = 64 * 1024, LENGTH_BYTES = 4 };

// From a descriptor to the host: read straight into the frame, as far as the host has granted credit.
struct output_stream {
    struct source source; // -1: closed
    uint32_t stream;      // 0: the host does not want it, and what is read is dropped
    uint64_t credit;
    bool readable;
    bool no_descriptors; // of a Unix socket: it ends where its peer passes some
    bool refused;        // that is why it has ended
};

// From the host to a descriptor. What the descriptor does not accept yet is kept, within the host's credit.
struct input_stream {
    struct source source; // -1: closed
    uint32_t stream;      // 0: none, or it was reset
    uint32_t granted;     // bytes that the host may still send
    uint32_t consumed;    // bytes written whose credit has not been returned yet
    struct buffer pending;
    bool ended; // no more will come
    bool writable;
    bool hung_up;  // the other end was closed as a whole, and sends nothing either
    bool messages; // each comes after its length (u32 LE), and is written at once
    bool socket;   // shut down for writing at its end, as the other direction goes on
};

struct output_stream output_stream_make(uint32_t stream, uint32_t credit);
struct input_stream input_stream_make(uint32_t stream);

// Moves bytes as far as the channel's space and credit go. `last`: nothing more will be written to the
// descriptor than is there now. `hold_end`: the end must not be reported yet.
void output_stream_pump(struct output_stream *output, struct agent *agent, bool last, bool hold_end);
void input_stream_pump(struct input_stream *input, struct agent *agent);

// Whether pumping it would do something.
bool output_stream_has_work(const struct output_stream *output, const struct channel *channel, bool last);

// Grants the host its first credit.
void input_stream_begin(struct input_stream *input, struct channel *channel, uint32_t bytes);

void output_stream_end(struct output_stream *output, struct agent *agent);   // closes it, and sends CLOSE
void input_stream_refuse(struct input_stream *input, struct agent *agent);   // closes it, and sends RESET
void output_stream_close(struct output_stream *output, struct agent *agent); // closes it, and sends nothing
void input_stream_close(struct input_stream *input, struct agent *agent);

// Whether the frame was for this stream; FRAME_INVALID: it was, and breaks the protocol.
int output_stream_frame(struct output_stream *output, struct agent *agent, const struct frame *frame);
int input_stream_frame(struct input_stream *input, const struct frame *frame);
