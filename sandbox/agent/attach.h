// Attachments: hosts that listen in on a running container and speak to its stdin. Like execs they belong
// to the connection. What a container says goes to its log and to each attachment, from one read.
//
// Nothing of it is lost for a reader that is slow: each output of an attachment keeps ATTACH_BOUND bytes,
// and when they are full the container's writer waits. But not for a reader that has stopped: one that
// lets nothing through for `stall_timeout_ms` is cut off, and container, log and the others go on.
#pragma once

#include "container.h"
#include "stream.h"

enum { ATTACHMENTS_MAX = 256, ATTACH_BOUND = 256 * 1024 };

// One output on its way to the host. It is open while it has a stream.
struct ear {
    uint32_t stream;
    uint64_t credit;
    struct buffer pending;
};

struct attachment {
    struct attachment *next;
    struct agent *agent;
    struct container *container; // NULL: has ended, what is pending still goes out
    char container_id[ID_MAX + 1];
    char id[ID_MAX + 1];
    struct ear ears[2];
    struct inlet inlet;
    bool stdin_once;
    uint32_t stall_timeout_ms;
    uint64_t stuck_since_ms; // an ear is full and does not get emptier; 0: none is
    bool late;
};

void attach_start(struct agent *agent, uint32_t request, const Attach *message);

// For the taps of containers: see struct tee.
extern const struct tee attach_tee;

// Nothing more will come of this container.
void attach_container_ended(struct container *container);

int attach_frame(struct agent *agent, const struct frame *frame);
void attach_pump(struct agent *agent);
bool attach_has_work(const struct agent *agent);

// Until a reader's patience ends; -1: no reader is stuck.
int attach_timeout_ms(const struct agent *agent);

// The connection is gone.
void attach_disconnect(struct agent *agent);
