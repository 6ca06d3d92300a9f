// The two directions of a stream, between a descriptor in the guest and the channel: used by execs,
// by attachments (their input) and by dialled connections. A reader that stops blocks its own stream only.
#pragma once

#include "channel.h"

struct agent;

// From a descriptor to the host: read straight into the frame when the host has given credit.
struct outlet {
    struct source source; // -1: closed
    uint32_t stream;      // 0: nobody wants it, what comes is thrown away
    uint64_t credit;
    bool readable;
};

// From the host to a descriptor: what that did not take yet is kept, within the credit given to the host.
struct inlet {
    struct source source; // -1: closed
    uint32_t stream;
    uint32_t granted;  // what the host may still send
    uint32_t consumed; // written, not granted anew yet
    struct buffer pending;
    bool ended; // no more will come
    bool writable;
    bool socket; // its end is a shutdown: the other direction goes on
};

struct outlet outlet_make(uint32_t stream, uint32_t credit);
struct inlet inlet_make(uint32_t stream);

// As far as room and credit go. `last`: what is not there now will not come. `keep`: its end is not told yet.
void outlet_pump(struct outlet *outlet, struct agent *agent, bool last, bool keep);
void inlet_pump(struct inlet *inlet, struct agent *agent);

// True if pumping it would do something.
bool outlet_has_work(const struct outlet *outlet, const struct channel *channel, bool last);

// The host gets its first credit.
void inlet_begin(struct inlet *inlet, struct channel *channel);

void outlet_end(struct outlet *outlet, struct agent *agent);   // closed, and the host told so
void inlet_refuse(struct inlet *inlet, struct agent *agent);   // the same
void outlet_close(struct outlet *outlet, struct agent *agent); // without a word
void inlet_close(struct inlet *inlet, struct agent *agent);

// True if the frame was for this stream. -1: it breaks the protocol.
int outlet_frame(struct outlet *outlet, struct agent *agent, const struct frame *frame);
int inlet_frame(struct inlet *inlet, const struct frame *frame);
