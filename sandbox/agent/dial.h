// Connections to TCP ports inside the pod, for the host's port-forwarding. They belong to the connection
// that asked for them, and each is alone in failing.
#pragma once

#include "protocol.h"
#include "stream.h"

enum { DIALS_MAX = 256 };

struct dial {
    struct dial *next;
    struct agent *agent;
    uint32_t request; // to be answered when it is connected or has failed; 0: it was
    uint16_t port;
    bool v6;                  // 127.0.0.1 has failed
    struct source connecting; // -1: is not
    bool decided;             // the kernel has something to say about `connecting`
    bool hung_up;             // by the host
    struct error error;       // of 127.0.0.1
    struct inlet inlet;
    struct outlet outlet;
};

void dial_start(struct agent *agent, uint32_t request, const Dial *message);
int dial_frame(struct agent *agent, const struct frame *frame);
void dial_pump(struct agent *agent);
bool dial_has_work(const struct agent *agent);
void dial_disconnect(struct agent *agent);
