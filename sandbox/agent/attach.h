// Attachments: each streams a running container's output to the host from now on, and may write to its
// stdin. Like execs they belong to the connection. Every byte that is read from the container goes to its
// log and to each attachment.
//
// A slow host loses nothing: each output of an attachment queues ATTACH_BOUND bytes, and when they are full
// the container's writer blocks. A host that grants no credit for `stall_timeout_ms` is detached, and
// container, log and the other attachments go on.
#pragma once

#include "agent.h"
#include "container.h"
#include "stream.h"

enum { ATTACHMENTS_MAX = 512, ATTACH_BOUND = 256 * 1024 };

// Output on its way to the host. Open while it has a stream.
struct output_queue {
    uint32_t stream;
    uint64_t credit;
    struct buffer pending;
};

struct attachment {
    struct attachment *next;
    struct agent *agent;
    struct container *container; // NULL: has ended; what is queued is still sent
    char container_id[ID_MAX + 1];
    char id[ID_MAX + 1];
    struct output_queue queues[2];
    struct input_stream input;
    bool stdin_once;
    uint32_t stall_timeout_ms;
    uint64_t stalled_since_ms; // a queue has been full since then; 0: none is
    bool stalled;              // detached for that
};

// Queues containers' output for their attachments.
extern const struct observer attach_observer;

void attach_start(struct agent *agent, uint32_t request, const Attach *message);

// Whether the frame was for a stream of an attachment; FRAME_INVALID: it was, and breaks the protocol.
int attach_frame(struct agent *agent, const struct frame *frame);

void attach_pump(struct agent *agent);
bool attach_has_work(const struct agent *agent);

// Milliseconds until the next attachment reaches its stall timeout; -1: none is stalled.
int attach_timeout_ms(const struct agent *agent);

// The connection was lost: ends all attachments.
void attach_disconnect(struct agent *agent);
