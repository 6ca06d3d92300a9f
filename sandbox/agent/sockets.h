// Sockets that stand for sockets of the host: containers bind and connect to them, and the host accepts the
// connections and carries them on. See ListenSockets and AcceptSocket in guest.proto.
#pragma once

#include "agent.h"
#include "protocol.h"

int sockets_listen(struct agent *agent, const ListenSockets *request, struct error *error);
int sockets_keep(struct agent *agent, const KeepSockets *request);

// Replies once a connection was accepted.
void sockets_accept(struct agent *agent, uint32_t request, const AcceptSocket *message);

// Whether the frame was for a stream of a waiting request.
int sockets_frame(struct agent *agent, const struct frame *frame);

void sockets_pump(struct agent *agent);

// The connection to the host was lost: forgets the waiting requests. The sockets stay.
void sockets_disconnect(struct agent *agent);
