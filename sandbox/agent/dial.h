// Connects to TCP ports inside the pod, for the host's port-forwarding. What is connected is a connection
// (connection.h). The failure of one does not affect the others.
#pragma once

#include "agent.h"
#include "protocol.h"

enum { DIALS_MAX = 1024 };

struct dial {
    struct dial *next;
    struct agent *agent;
    uint32_t request; // to answer once it is connected or has failed
    uint32_t to_port, from_port, window;
    uint16_t port;
    bool v6;                  // 127.0.0.1 has failed, [::1] is tried
    struct source connecting; // -1: not any more
    bool decided;             // connect(2) has succeeded or failed
    bool hung_up;             // by the host
    struct error error;       // of 127.0.0.1
};

// Replies once it is connected or has failed.
void dial_start(struct agent *agent, uint32_t request, const Dial *message);

// Whether the frame was for a stream of a connection that is being made; FRAME_INVALID: it was, and breaks
// the protocol.
int dial_frame(struct agent *agent, const struct frame *frame);

void dial_pump(struct agent *agent);

// The connection to the host was lost: closes those that are being made.
void dial_disconnect(struct agent *agent);
