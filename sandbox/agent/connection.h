// Connections between a socket in the guest and two streams of the host: dialled (dial.h) or accepted
// (sockets.h). They belong to the connection to the host that requested them.
//
// Each direction ends by itself: at its end or error the stream is closed or reset, and by a CLOSE or RESET
// of the host the socket is shut down. A socket whose other end was closed as a whole takes nothing more
// either.
#pragma once

#include "agent.h"
#include "error.h"
#include "stream.h"

struct connection {
    struct connection *next;
    struct agent *agent;
    struct input_stream input;
    struct output_stream output;
    bool whole;    // a RESET by the host ends both directions at once, with what is on its way
    bool hung_up;  // it came
    bool messages; // boundaries are kept: the streams carry each message after its length
    const struct listener *listener; // of datagrams: those of `uid` and `gid` alone; NULL: another kind
    uid_t uid;
    gid_t gid;
    struct buffer rest; // of a message that was read
};

// Takes over the descriptor of a non-blocking, connected socket. The caller fills in what kind it is.
// Returns NULL with `error` if it cannot, and then closes the descriptor.
struct connection *connection_open(struct agent *agent, int fd, uint32_t to_guest, uint32_t from_guest,
                                   uint32_t window, struct error *error);

// Begins to move bytes.
void connection_begin(struct connection *connection);

// Whether the frame was for a stream of a connection; FRAME_INVALID: it was, and breaks the protocol.
int connection_frame(struct agent *agent, const struct frame *frame);

void connection_pump(struct agent *agent);
bool connection_has_work(const struct agent *agent);

// The connection to the host was lost: closes all.
void connection_disconnect(struct agent *agent);
